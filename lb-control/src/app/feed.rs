//! Objects from files, as updates.

use std::{path::Path, sync::Arc};

use anyhow::Result;
use tokio::sync::mpsc;

use crate::{
    model::Objects,
    source::{
        Update,
        file::{self, Snapshot},
    },
};

/// Follows a file or directory. The first update comes at once.
///
/// # Errors
/// When it cannot be watched or read at all.
pub fn files(config: &Path) -> Result<mpsc::Receiver<Update>> {
    let mut watcher = file::watch(config, file::Settings::default())?;
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut objects = Objects::default();
        loop {
            let snapshot: Arc<Snapshot> = watcher.snapshots.borrow_and_update().clone();
            let changes = objects.changes_to(&snapshot.objects);
            objects = snapshot.objects.clone();
            let update = Update { synced: true, changes, problems: Some(snapshot.problems.clone()) };
            if sender.send(update).await.is_err() || watcher.snapshots.changed().await.is_err() {
                break;
            }
        }
    });
    Ok(receiver)
}
