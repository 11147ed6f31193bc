//! The Unix socket as a file.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail};
use tokio::net::UnixListener;

/// Listens on a Unix socket that only its owner may use. The directory is created if it lacks. A
/// socket that nobody listens on any more, as `kill -9` leaves it behind, is replaced.
///
/// Must be called within a tokio runtime.
///
/// # Errors
/// When another process listens there, or something other than a socket lies there, or the
/// directory may not be written.
pub fn bind(path: &Path) -> Result<UnixListener> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)
            .with_context(|| format!("creating the directory {} of the socket", parent.display()))?;
    }
    remove_stale(path)?;
    // Bound under another name first: from the moment it has its name, nobody else may connect.
    let unfinished = path.with_extension(format!("{}.new", std::process::id()));
    let listener = UnixListener::bind(&unfinished)
        .with_context(|| format!("listening on the socket {}", path.display()))?;
    let finish = || {
        fs::set_permissions(&unfinished, fs::Permissions::from_mode(0o600))?;
        fs::rename(&unfinished, path)
    };
    if let Err(error) = finish() {
        // The first error is the one that matters.
        let _ = fs::remove_file(&unfinished);
        return Err(error).with_context(|| format!("putting the socket {} in place", path.display()));
    }
    Ok(listener)
}

fn remove_stale(path: &Path) -> Result<()> {
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        metadata => metadata.with_context(|| format!("looking at {}", path.display()))?,
    };
    if !metadata.file_type().is_socket() {
        bail!("{} exists and is no socket: remove it, or choose another --socket", path.display());
    }
    match UnixStream::connect(path) {
        Ok(_) => bail!(
            "another agent answers on {}: stop it first (two agents in one network namespace would take each other's VIPs away)",
            path.display()
        ),
        Err(error) if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) => {}
        Err(error) => {
            return Err(error)
                .with_context(|| format!("asking whether somebody listens on {}", path.display()));
        }
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing the stale socket {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_is_for_its_owner_and_stands_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/er/agent.sock");
        let _listener = bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        // Dropping a listener leaves its file, as a killed process does.
        drop(bind(&path).unwrap());
        assert!(path.exists());
        let _listener = bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[tokio::test]
    async fn a_socket_in_use_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        let _listener = bind(&path).unwrap();
        let error = bind(&path).unwrap_err().to_string();
        assert!(error.contains("another agent answers") && error.contains("stop it first"), "{error}");
        UnixStream::connect(&path).unwrap();
    }

    #[tokio::test]
    async fn a_file_of_somebody_else_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        fs::write(&path, "precious").unwrap();
        let error = bind(&path).unwrap_err().to_string();
        assert!(error.contains("is no socket"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }
}
