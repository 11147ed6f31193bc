//! The container image, unpacked by hand and run without anything of this machine.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};

fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn variable(name: &str) -> Option<PathBuf> {
    let found = std::env::var_os(name).map(PathBuf::from);
    if found.is_none() {
        println!("SKIP: {name} is not set; `cargo xtask test` sets it");
    }
    found
}

/// A blob's path, after comparing its content with its name and its size.
fn blob(layout: &Path, descriptor: &Value) -> PathBuf {
    let digest = descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
    let path = layout.join("blobs/sha256").join(digest);
    let sum = succeed(Command::new("sha256sum").arg(&path));
    assert_eq!(sum.split_whitespace().next(), Some(digest));
    assert_eq!(descriptor["size"], json!(path.metadata().unwrap().len()));
    path
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn unpack(archive: &Path, directory: &Path) {
    fs::create_dir_all(directory).unwrap();
    succeed(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(directory));
}

#[test]
fn the_image_runs_on_its_own() {
    let (Some(xtask), Some(agent)) = (variable("POINTSMAN_XTASK"), variable("POINTSMAN_BIN")) else { return };
    let work = tempfile::tempdir().unwrap();
    let build = |name: &str| {
        let archive = work.path().join(name);
        succeed(Command::new(&xtask).arg("image").arg("--binary").arg(&agent).arg("--output").arg(&archive));
        archive
    };
    let archive = build("one.tar");
    assert_eq!(fs::read(&archive).unwrap(), fs::read(build("two.tar")).unwrap(), "it can be built again");

    let layout = work.path().join("layout");
    unpack(&archive, &layout);
    assert_eq!(json(&layout.join("oci-layout")), json!({ "imageLayoutVersion": "1.0.0" }));
    let index = json(&layout.join("index.json"));
    let manifest = json(&blob(&layout, &index["manifests"][0]));
    let config = json(&blob(&layout, &manifest["config"]));
    assert_eq!(config["config"]["Entrypoint"], json!(["/pointsman"]));
    assert_eq!(manifest["layers"].as_array().unwrap().len(), 1);
    let layer = blob(&layout, &manifest["layers"][0]);
    let plain = work.path().join("layer.tar");
    fs::write(&plain, succeed_bytes(Command::new("gzip").arg("-dc").arg(&layer))).unwrap();
    let sum = succeed(Command::new("sha256sum").arg(&plain));
    let diff_id = format!("sha256:{}", sum.split_whitespace().next().unwrap());
    assert_eq!(config["rootfs"]["diff_ids"], json!([diff_id]));

    let root = work.path().join("root");
    unpack(&plain, &root);
    let names = succeed(Command::new("tar").arg("-tf").arg(&plain));
    assert!(!names.lines().any(|name| name.ends_with("/sh") || name.contains("busybox")), "{names}");
    for directory in ["bpf", "run/pointsman"] {
        assert!(root.join(directory).is_dir(), "{directory} is mounted over");
    }
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP: needs root for chroot");
        return;
    }
    let run = |argument: &str| {
        let mut command = Command::new("/usr/sbin/chroot");
        succeed(command.arg(&root).args(["/pointsman", argument]).env_clear())
    };
    assert_eq!(run("--version"), format!("pointsman {}\n", env!("CARGO_PKG_VERSION")));
    assert!(run("crds").contains("kind: CustomResourceDefinition"));
}

fn succeed_bytes(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}");
    output.stdout
}
