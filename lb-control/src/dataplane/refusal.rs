//! Why a kernel refuses a program, as a sentence instead of a page of registers.

/// What is found in the last words of a verifier, what is lacking then, and what helps.
///
/// The words are those of kernel/bpf/verifier.c; a kernel is not asked for its version, because
/// distributions carry features to older ones.
const SIGNS: [Sign; 6] = [
    // A helper is called by its number; kernels that lack it have no name for it.
    Sign {
        words: "unknown#160",
        lack: "the helper bpf_ktime_get_coarse_ns, which came with Linux 5.11",
        way_out: NEWER,
    },
    Sign {
        words: "unknown#20",
        lack: "the helpers for SYN cookies, which came with Linux 6.0",
        way_out: "boot a newer kernel on this node, or do without: --syn-cookies=off",
    },
    Sign {
        words: "BPF_STX uses reserved fields",
        lack: "atomic operations that give the former value, which came with Linux 5.12",
        way_out: NEWER,
    },
    Sign {
        words: "tail_calls are not allowed in non-JITed programs",
        lack: "a compiler for BPF, or it is turned off",
        way_out: "turn it on: sysctl net.core.bpf_jit_enable=1; if there is no such setting, the kernel \
                  was built without CONFIG_BPF_JIT and another one is needed",
    },
    Sign {
        words: "misaligned packet access",
        lack: "access to packets at odd addresses (CONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS)",
        way_out: "there is none on this processor: use nodes of amd64 or arm64",
    },
    Sign {
        words: "BPF program is too large",
        lack: "patience: its verifier gives up before it has seen the whole program",
        way_out: NEWER,
    },
];

const NEWER: &str =
    "boot a newer kernel on this node (README.md says which are known to work), or keep the agent off it";

struct Sign {
    words: &'static str,
    lack: &'static str,
    way_out: &'static str,
}

/// What the kernel that wrote this log lacks, and the way out; `None` if that is not known.
pub(super) fn explain(log: &str) -> Option<String> {
    let sign = SIGNS.iter().find(|sign| log.contains(sign.words))?;
    Some(format!("it lacks {}; {}", sign.lack, sign.way_out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_refusals_name_the_lack_and_the_way_out() {
        for (log, lack, way_out) in [
            (
                "187: (85) call unknown#160\ninvalid func unknown#160\n",
                "bpf_ktime_get_coarse_ns",
                "newer kernel",
            ),
            ("912: (85) call unknown#204\ninvalid func unknown#204\n", "Linux 6.0", "--syn-cookies=off"),
            ("BPF_STX uses reserved fields\nprocessed 0 insns\n", "Linux 5.12", "newer kernel"),
            (
                "1855: (85) call bpf_tail_call#12\n\
                 tail_calls are not allowed in non-JITed programs with bpf-to-bpf calls\n",
                "a compiler for BPF",
                "bpf_jit_enable=1",
            ),
            ("misaligned packet access off 2+(0x0; 0x1ff)+0+2 size 2\n", "odd addresses", "amd64"),
            ("BPF program is too large. Processed 1000001 insn\n", "patience", "newer kernel"),
        ] {
            let sentence = explain(log).unwrap();
            assert!(sentence.contains(lack) && sentence.contains(way_out), "{sentence}");
        }
    }

    #[test]
    fn others_are_left_to_the_log() {
        assert_eq!(explain("R1 invalid mem access 'scalar'\n"), None);
        assert_eq!(explain(""), None);
    }
}
