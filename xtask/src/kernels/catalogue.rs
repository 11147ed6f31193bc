//! The kernels that tests run on beside the machine's own.

use anyhow::{Result, bail};

/// What runs a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// The kernel is a program.
    UserMode,
    /// A processor in software: slow, but any kernel, as it is shipped.
    Emulated,
}

/// A kernel as Debian ships it.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    /// As given to `--kernels`, and in `tests/kernel_budget.txt`.
    pub name: &'static str,
    /// Release of Debian.
    pub release: &'static str,
    /// Its package, or one that depends on the newest.
    pub package: &'static str,
    pub machine: Machine,
}

/// From the quickest to the slowest.
pub static ALL: [Kernel; 4] = [
    Kernel { name: "6.1-uml", release: "bookworm", package: "user-mode-linux", machine: Machine::UserMode },
    Kernel {
        name: "5.10",
        release: "bullseye",
        package: "linux-image-cloud-amd64",
        machine: Machine::Emulated,
    },
    Kernel {
        name: "6.1",
        release: "bookworm",
        package: "linux-image-cloud-amd64",
        machine: Machine::Emulated,
    },
    Kernel {
        name: "6.12",
        release: "trixie",
        package: "linux-image-cloud-amd64",
        machine: Machine::Emulated,
    },
];

/// Those with these names; all without any.
///
/// # Errors
/// A name that is none, with those that there are.
pub fn select(names: &[String]) -> Result<Vec<&'static Kernel>> {
    if let Some(unknown) = names.iter().find(|name| ALL.iter().all(|kernel| kernel.name != **name)) {
        let known: Vec<_> = ALL.iter().map(|kernel| kernel.name).collect();
        bail!("no kernel `{unknown}`; there are: {}", known.join(", "));
    }
    Ok(ALL.iter().filter(|kernel| names.is_empty() || names.iter().any(|name| name == kernel.name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_selected_by_name_and_all_without_one() {
        let names = |names: &[&str]| -> Vec<&str> {
            let names: Vec<_> = names.iter().map(ToString::to_string).collect();
            select(&names).unwrap().iter().map(|kernel| kernel.name).collect()
        };
        assert_eq!(names(&[]), ["6.1-uml", "5.10", "6.1", "6.12"]);
        assert_eq!(names(&["6.12", "6.1"]), ["6.1", "6.12"]);
        let error = select(&["6.2".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("no kernel `6.2`") && error.contains("6.1-uml, 5.10"), "{error}");
    }
}
