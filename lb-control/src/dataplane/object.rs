//! The kernel programs that this binary carries.

/// The ELF object with all programs and maps, with BTF; empty when it was not built before this
/// binary. Aligned as the ELF reader needs it.
static BYTES: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/kernel-programs.o"));

/// This binary was compiled without the kernel programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotBuilt;

impl std::fmt::Display for NotBuilt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(
            "this pointsman was built without the kernel programs: run `cargo xtask build`, \
             or `cargo xtask build-ebpf` before `cargo build`",
        )
    }
}

impl std::error::Error for NotBuilt {}

/// The ELF object to load.
pub fn bytes() -> Result<&'static [u8], NotBuilt> {
    if BYTES.is_empty() { Err(NotBuilt) } else { Ok(BYTES) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_embedded_is_a_bpf_object_or_reported_as_absent() {
        const ELF_64_LITTLE_ENDIAN: &[u8] = b"\x7fELF\x02\x01";
        const EM_BPF: [u8; 2] = 247u16.to_le_bytes();
        match bytes() {
            Ok(object) => {
                assert!(object.starts_with(ELF_64_LITTLE_ENDIAN));
                assert_eq!(object[18..20], EM_BPF);
                assert_eq!(object.as_ptr().align_offset(8), 0);
            }
            Err(error) => assert!(error.to_string().contains("cargo xtask build-ebpf")),
        }
    }
}
