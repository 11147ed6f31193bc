//! The OCI image layout (image-spec 1.1): blobs named by their digest, an index that leads to them.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::process;

/// What the image says about itself.
pub struct About {
    /// With tag.
    pub name: String,
    pub version: String,
    pub architecture: &'static str,
    /// Commit.
    pub revision: String,
    /// Since 1970.
    pub seconds: u64,
}

/// Writes the layout of an image with one layer.
pub fn write(root: &Path, layout: &Path, about: &About) -> Result<()> {
    let blobs = layout.join("blobs/sha256");
    std::fs::create_dir_all(&blobs)?;
    let layer = layout.join("layer.tar");
    tar(root, &layer, about.seconds)?;
    // Of the layer before it is compressed, as the configuration wants it.
    let diff_id = sha256(&layer)?;
    process::run(Command::new("gzip").arg("-n").arg(&layer))?;
    let layer = add(&blobs, &layout.join("layer.tar.gz"), "application/vnd.oci.image.layer.v1.tar+gzip")?;
    let created = created(about.seconds)?;
    let config = json!({
        "created": created,
        "architecture": about.architecture,
        "os": "linux",
        "config": {
            // The BPF file system belongs to root; pods without need of it say another user.
            "User": "0:0",
            "Entrypoint": ["/pointsman"],
            "WorkingDir": "/",
            "Labels": labels(about),
        },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{diff_id}")] },
        "history": [{ "created": created, "created_by": "cargo xtask image" }],
    });
    let config = add_json(&blobs, layout, &config, "application/vnd.oci.image.config.v1+json")?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config,
        "layers": [layer],
        "annotations": labels(about),
    });
    let mut manifest = add_json(&blobs, layout, &manifest, "application/vnd.oci.image.manifest.v1+json")?;
    manifest["platform"] = json!({ "architecture": about.architecture, "os": "linux" });
    manifest["annotations"] = json!({
        "org.opencontainers.image.ref.name": about.version,
        // containerd takes the name from here.
        "io.containerd.image.name": about.name,
    });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [manifest],
    });
    std::fs::write(layout.join("index.json"), index.to_string())?;
    std::fs::write(layout.join("oci-layout"), json!({ "imageLayoutVersion": "1.0.0" }).to_string())?;
    Ok(())
}

fn labels(about: &About) -> Value {
    json!({
        "org.opencontainers.image.title": "pointsman",
        "org.opencontainers.image.description": "A load balancer for Kubernetes edge nodes, in XDP",
        "org.opencontainers.image.licenses": env!("CARGO_PKG_LICENSE"),
        "org.opencontainers.image.version": about.version,
        "org.opencontainers.image.revision": about.revision,
    })
}

/// Packs a directory's content, with nothing of the machine or the hour in it.
pub fn tar(directory: &Path, archive: &Path, seconds: u64) -> Result<()> {
    let mut command = Command::new("tar");
    command.args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--format=gnu"]);
    command.args(["--mode=u+rwX,go+rX,go-w", &format!("--mtime=@{seconds}"), "-cf"]).arg(archive);
    let mut names: Vec<_> =
        std::fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<_>>()?;
    names.sort();
    process::run(command.arg("-C").arg(directory).args(names))
}

fn add_json(blobs: &Path, layout: &Path, value: &Value, media_type: &str) -> Result<Value> {
    let path = layout.join("blob.json");
    std::fs::write(&path, value.to_string())?;
    add(blobs, &path, media_type)
}

/// Moves a file to the blobs and returns its descriptor.
fn add(blobs: &Path, file: &Path, media_type: &str) -> Result<Value> {
    let digest = sha256(file)?;
    let size = file.metadata()?.len();
    std::fs::rename(file, blobs.join(&digest))?;
    Ok(json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size }))
}

fn sha256(file: &Path) -> Result<String> {
    let text = process::stdout(Command::new("sha256sum").arg("--binary").arg(file))?;
    // A backslash in front says that the name is escaped.
    let digest = text.trim_start_matches('\\').split_whitespace().next();
    Ok(digest.context("sha256sum printed nothing")?.to_owned())
}

/// RFC 3339, in UTC.
fn created(seconds: u64) -> Result<String> {
    let mut command = Command::new("date");
    command.args(["--utc", "+%Y-%m-%dT%H:%M:%SZ", "--date", &format!("@{seconds}")]);
    Ok(process::stdout(&mut command)?.trim().to_owned())
}
