//! Source ranges as a filter on a listening socket: the kernel runs it before it answers, so whoever is
//! not in them sees nothing, as on the kernel path.

use ipnet::IpNet;
use nix::libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_MAXINSNS, BPF_RET, BPF_W, SKF_NET_OFF,
};
use socket2::{SockFilter, Socket};

/// Where the source address is in the headers.
const SOURCE_V4: u32 = 12;
const SOURCE_V6: u32 = 8;
/// Verdicts: so many bytes of the packet are kept.
const DROP: u32 = 0;
const PASS: u32 = u32::MAX;

/// One instruction. Nothing jumps when a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    code: u32,
    /// How many instructions to leave out if a condition does not hold.
    if_false: u8,
    operand: u32,
}

impl From<Instruction> for SockFilter {
    #[expect(clippy::cast_possible_truncation, reason = "codes have 16 bits")]
    fn from(one: Instruction) -> Self {
        Self::new(one.code as u16, 0, one.if_false, one.operand)
    }
}

/// Lets the kernel drop what comes to a socket from outside of the ranges. Says whether it does; if not,
/// whoever uses the socket has to.
pub fn apply(socket: &Socket, ranges: &[IpNet], is_v4: bool) -> bool {
    let is_set = program(ranges, is_v4).is_some_and(|program| {
        let program: Vec<SockFilter> = program.into_iter().map(Into::into).collect();
        socket.attach_filter(&program).is_ok()
    });
    if !is_set {
        // An error if there is none.
        let _ = socket.detach_filter();
    }
    is_set
}

/// A program of classic BPF that lets packets from the ranges of a family pass, and no others. `None` if
/// everybody may connect, or the program would be too long.
#[must_use]
pub fn program(ranges: &[IpNet], is_v4: bool) -> Option<Vec<Instruction>> {
    if ranges.is_empty() {
        return None;
    }
    let mut program = Vec::new();
    for range in IpNet::aggregate(&ranges.to_vec()) {
        match range {
            IpNet::V4(range) if is_v4 => {
                let word = u32::from(range.network());
                test(&mut program, SOURCE_V4, &[word], range.prefix_len().into());
            }
            IpNet::V6(range) if !is_v4 => {
                let octets = range.network().octets();
                let words: Vec<u32> = octets
                    .chunks(4)
                    .map(|word| word.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte)))
                    .collect();
                test(&mut program, SOURCE_V6, &words, range.prefix_len().into());
            }
            _ => {}
        }
    }
    program.push(instruction(BPF_RET | BPF_K, 0, DROP));
    (program.len() <= BPF_MAXINSNS as usize).then_some(program)
}

/// Passes if the address begins with the bits; else goes on after it.
fn test(program: &mut Vec<Instruction>, offset: u32, words: &[u32], bits: u32) {
    let mut block = Vec::new();
    let parts = (0u32..).zip(words).take_while(|(index, _)| *index == 0 || index * 32 < bits);
    for (index, word) in parts {
        let mask = match bits.saturating_sub(index * 32) {
            0 => break,
            bits if bits >= 32 => u32::MAX,
            bits => !(u32::MAX >> bits),
        };
        let at = SKF_NET_OFF.cast_unsigned().wrapping_add(offset + 4 * index);
        block.push((BPF_LD | BPF_W | BPF_ABS, at));
        if mask != u32::MAX {
            block.push((BPF_ALU | BPF_AND | BPF_K, mask));
        }
        block.push((BPF_JMP | BPF_JEQ | BPF_K, word & mask));
    }
    let length = block.len() + 1;
    for (place, (code, operand)) in block.into_iter().enumerate() {
        let is_jump = code == BPF_JMP | BPF_JEQ | BPF_K;
        // Over the rest of the block, which is at most twelve long.
        let over = if is_jump { u8::try_from(length - place - 1).unwrap_or(u8::MAX) } else { 0 };
        program.push(instruction(code, over, operand));
    }
    program.push(instruction(BPF_RET | BPF_K, 0, PASS));
}

fn instruction(code: u32, if_false: u8, operand: u32) -> Instruction {
    Instruction { code, if_false, operand }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    /// What the kernel would make of a packet from an address.
    fn passes(program: &[Instruction], source: IpAddr) -> bool {
        let octets = match source {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        let header = if source.is_ipv4() { SOURCE_V4 } else { SOURCE_V6 };
        let (mut at, mut accumulator) = (0, 0u32);
        loop {
            let instruction = program[at];
            at += 1;
            match instruction.code {
                code if code == BPF_LD | BPF_W | BPF_ABS => {
                    let offset = instruction.operand.wrapping_sub(SKF_NET_OFF.cast_unsigned()) - header;
                    let word = &octets[offset as usize..][..4];
                    accumulator = u32::from_be_bytes(word.try_into().unwrap());
                }
                code if code == BPF_ALU | BPF_AND | BPF_K => accumulator &= instruction.operand,
                code if code == BPF_JMP | BPF_JEQ | BPF_K => {
                    if accumulator != instruction.operand {
                        at += usize::from(instruction.if_false);
                    }
                }
                code if code == BPF_RET | BPF_K => return instruction.operand != DROP,
                code => panic!("{code:#x}"),
            }
        }
    }

    #[test]
    fn as_the_ranges_say() {
        let ranges = [
            "192.0.2.1/32",
            "198.51.100.0/25",
            "10.0.0.0/8",
            "2001:db8::/33",
            "fd00::7/128",
            "fe80::/10",
            "2001:db8:ffff:1::/64",
        ];
        let ranges: Vec<IpNet> = ranges.map(|text| text.parse().unwrap()).into();
        let programs = [program(&ranges, true).unwrap(), program(&ranges, false).unwrap()];
        for source in [
            "192.0.2.1",
            "192.0.2.2",
            "198.51.100.127",
            "198.51.100.128",
            "10.255.255.255",
            "11.0.0.0",
            "0.0.0.0",
            "2001:db8:7fff::1",
            "2001:db8:8000::1",
            "fd00::7",
            "fd00::8",
            "fd00::1:0:7",
            "febf::1",
            "fec0::1",
            "2001:db8:ffff:1::9",
            "2001:db8:ffff:2::9",
            "::",
        ] {
            let source: IpAddr = source.parse().unwrap();
            let expected = ranges.iter().any(|range| range.contains(&source));
            assert_eq!(passes(&programs[usize::from(source.is_ipv6())], source), expected, "{source}");
        }
    }

    #[test]
    fn everybody_and_nobody() {
        assert!(program(&[], true).is_none());
        let v6: Vec<IpNet> = vec!["2001:db8::/32".parse().unwrap()];
        assert!(!passes(&program(&v6, true).unwrap(), [192, 0, 2, 1].into()));
        let all: Vec<IpNet> = vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()];
        assert!(passes(&program(&all, true).unwrap(), [192, 0, 2, 1].into()));
        assert!(passes(&program(&all, false).unwrap(), "2001:db8::1".parse().unwrap()));
    }
}
