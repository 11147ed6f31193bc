//! Source ranges as a filter on a listening socket: the kernel runs it before it answers, so whoever is
//! not in them sees nothing, as on the kernel path.

use ipnet::IpNet;
use nix::libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_MAXINSNS, BPF_RET, BPF_W, SKF_NET_OFF,
};
use socket2::SockFilter;

/// Where the source address is in the headers.
const SOURCE_V4: u32 = 12;
const SOURCE_V6: u32 = 8;
/// Verdicts: so many bytes of the packet are kept.
const DROP: u32 = 0;
const PASS: u32 = u32::MAX;

/// A program of classic BPF that lets packets from the ranges of a family pass, and no others. `None` if
/// everybody may connect, or the program would be too long.
#[must_use]
pub fn program(ranges: &[IpNet], is_v4: bool) -> Option<Vec<SockFilter>> {
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
fn test(program: &mut Vec<SockFilter>, offset: u32, words: &[u32], bits: u32) {
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

#[expect(clippy::cast_possible_truncation, reason = "codes have 16 bits")]
fn instruction(code: u32, if_false: u8, operand: u32) -> SockFilter {
    SockFilter::new(code as u16, 0, if_false, operand)
}
