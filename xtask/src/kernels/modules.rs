//! Kernel modules out of an unpacked package, in the order in which they can be loaded.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// A module as the kernel takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    pub name: String,
    pub bytes: Vec<u8>,
}

/// The modules with these names, each after those that it needs. Names that the kernel has no module
/// for are left out: they are built into it, or what needs them will say so.
pub fn in_order(tree: &Path, names: &[&str]) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    find(tree, &mut files)?;
    let mut modules = Vec::new();
    for name in names {
        add(&files, name, &mut modules)?;
    }
    Ok(modules)
}

fn find(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("no modules in {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() {
            find(&path, files)?;
        } else if let Some(name) = path.file_name().and_then(|name| name.to_str()).and_then(module_name) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// `af_packet` of `af-packet.ko.xz`; modules call each other by names with underscores.
fn module_name(file: &str) -> Option<String> {
    let (name, extension) = file.split_once(".ko")?;
    matches!(extension, "" | ".xz" | ".zst" | ".gz").then(|| name.replace('-', "_"))
}

fn add(files: &BTreeMap<String, PathBuf>, name: &str, modules: &mut Vec<Module>) -> Result<()> {
    if modules.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let Some(path) = files.get(name) else { return Ok(()) };
    let bytes = read(path)?;
    // The kernel refuses circles when it is built.
    for needed in needs(&bytes) {
        add(files, &needed, modules)?;
    }
    modules.push(Module { name: name.to_owned(), bytes });
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).with_context(|| format!("cannot read {}", path.display())),
    };
    let output = Command::new(program)
        .arg("-dc")
        .arg(path)
        .output()
        .with_context(|| format!("cannot start {program}, which unpacks {}", path.display()))?;
    if !output.status.success() {
        bail!("{program} cannot unpack {}: {}", path.display(), String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout)
}

/// Names after `depends=` in the module's section `.modinfo`, whose strings end with zeros.
fn needs(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|bytes| bytes == KEY) else { return Vec::new() };
    let value = module[start + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value).into_owned();
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need_and_only_once() {
        let tree = std::env::temp_dir().join(format!("xtask-modules-{}", std::process::id()));
        fs::create_dir_all(tree.join("net/deep")).unwrap();
        for (file, needs) in
            [("net/bridge.ko", "stp,llc"), ("net/deep/stp.ko", "llc"), ("net/llc.ko", ""), ("other.ko", "")]
        {
            let bytes = format!("\x7fELF\0license=GPL\0depends={needs}\0name=x\0");
            fs::write(tree.join(file), bytes).unwrap();
        }
        let modules = in_order(&tree, &["bridge", "llc", "built_in"]).unwrap();
        let names: Vec<_> = modules.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["llc", "stp", "bridge"]);
        fs::remove_dir_all(tree).unwrap();
    }

    #[test]
    fn file_names_become_names_of_modules() {
        assert_eq!(module_name("nf-tables.ko.xz").as_deref(), Some("nf_tables"));
        assert_eq!(module_name("veth.ko").as_deref(), Some("veth"));
        assert_eq!(module_name("modules.dep"), None);
        assert_eq!(module_name("veth.kobject"), None);
    }
}
