use std::{
    os::unix::fs::symlink,
    sync::atomic::{AtomicU32, Ordering},
};

use super::*;

/// Far beyond what a change takes; the rescan is off, so that only inotify can bring it.
const PATIENCE: Duration = Duration::from_secs(10);

fn settings() -> Settings {
    Settings { rescan: Duration::from_secs(3600), ..Settings::default() }
}

fn service(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: 80}}]}}\n---\n"
    )
}

fn names(snapshot: &Snapshot) -> Vec<String> {
    let mut names: Vec<_> = snapshot.objects.services.keys().map(|object| object.name.clone()).collect();
    names.extend(snapshot.problems.iter().map(|_| "!".to_owned()));
    names
}

/// Waits until the snapshot has these Services, and a `!` for each problem.
async fn expect(watcher: &mut Watcher, expected: &[&str]) {
    let found = timeout(PATIENCE, watcher.snapshots.wait_for(|snapshot| names(snapshot) == expected)).await;
    let is_found = matches!(found, Ok(Ok(_)));
    drop(found);
    assert!(is_found, "expected {expected:?}, have {:?}", watcher.snapshots.borrow());
}

/// Replaces a file as editors and `mv` do.
fn replace(path: &Path, text: &str) {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let temporary = path.with_extension(format!("tmp{}", COUNT.fetch_add(1, Ordering::Relaxed)));
    fs::write(&temporary, text).unwrap();
    fs::rename(temporary, path).unwrap();
}

#[tokio::test]
async fn a_file_written_replaced_removed_and_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("services.conf");
    fs::write(&path, service("a")).unwrap();
    let mut watcher = watch(&path, settings()).unwrap();
    expect(&mut watcher, &["a"]).await;
    fs::write(&path, service("b")).unwrap();
    expect(&mut watcher, &["b"]).await;
    replace(&path, &service("c"));
    expect(&mut watcher, &["c"]).await;
    // The configuration as a whole is missing: everything stays, and it is said.
    fs::remove_file(&path).unwrap();
    expect(&mut watcher, &["c", "!"]).await;
    fs::write(&path, service("d")).unwrap();
    expect(&mut watcher, &["d"]).await;
    fs::write(&path, "").unwrap();
    expect(&mut watcher, &[]).await;
}

#[tokio::test]
async fn a_directory() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name);
    let mut watcher = watch(directory.path(), settings()).unwrap();
    expect(&mut watcher, &[]).await;
    fs::write(file("a.yaml"), service("a")).unwrap();
    expect(&mut watcher, &["a"]).await;
    for ignored in ["x.txt", ".x.yaml", "x.yaml~"] {
        fs::write(file(ignored), service("x")).unwrap();
    }
    fs::write(file("b.yml"), service("b")).unwrap();
    expect(&mut watcher, &["a", "b"]).await;
    fs::write(file("c.json"), "{").unwrap();
    expect(&mut watcher, &["a", "b", "!"]).await;
    fs::remove_file(file("c.json")).unwrap();
    fs::remove_file(file("a.yaml")).unwrap();
    expect(&mut watcher, &["b"]).await;
    symlink("/nonexistent", file("d.yaml")).unwrap();
    expect(&mut watcher, &["b", "!"]).await;
}

#[tokio::test]
async fn a_directory_that_is_replaced() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("config");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("a.yaml"), service("a")).unwrap();
    let mut watcher = watch(&directory, settings()).unwrap();
    fs::rename(&directory, parent.path().join("old")).unwrap();
    expect(&mut watcher, &["a", "!"]).await;
    fs::create_dir(&directory).unwrap();
    expect(&mut watcher, &[]).await;
    fs::write(directory.join("b.yaml"), service("b")).unwrap();
    expect(&mut watcher, &["b"]).await;
}

/// As kubelet updates a ConfigMap: a new directory, and a link that is swapped (AtomicWriter in
/// pkg/volume/util/atomic_writer.go).
#[tokio::test]
async fn a_mounted_config_map() {
    let directory = tempfile::tempdir().unwrap();
    let publish = |version: &str, text: &str| {
        let data = directory.path().join(format!("..{version}"));
        fs::create_dir(&data).unwrap();
        fs::write(data.join("services.yaml"), text).unwrap();
        symlink(format!("..{version}"), directory.path().join("..data_tmp")).unwrap();
        fs::rename(directory.path().join("..data_tmp"), directory.path().join("..data")).unwrap();
    };
    publish("1", &service("a"));
    symlink("..data/services.yaml", directory.path().join("services.yaml")).unwrap();
    let mut by_directory = watch(directory.path(), settings()).unwrap();
    let mut by_file = watch(&directory.path().join("services.yaml"), settings()).unwrap();
    for watcher in [&mut by_directory, &mut by_file] {
        expect(watcher, &["a"]).await;
    }
    publish("2", &service("b"));
    fs::remove_dir_all(directory.path().join("..1")).unwrap();
    for watcher in [&mut by_directory, &mut by_file] {
        expect(watcher, &["b"]).await;
    }
    publish("3", &service("c"));
    for watcher in [&mut by_directory, &mut by_file] {
        expect(watcher, &["c"]).await;
    }
}

#[tokio::test]
async fn a_link_to_elsewhere() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let target = there.path().join("target.yaml");
    fs::write(&target, service("a")).unwrap();
    symlink(&target, here.path().join("link.yaml")).unwrap();
    let mut watcher = watch(here.path(), settings()).unwrap();
    replace(&target, &service("b"));
    expect(&mut watcher, &["b"]).await;
    fs::write(&target, service("c")).unwrap();
    expect(&mut watcher, &["c"]).await;
}

#[tokio::test]
async fn reading_is_no_sign_of_a_change() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.yaml");
    fs::write(&path, service("a")).unwrap();
    let (sender, mut signs) = mpsc::unbounded_channel();
    let inotify = notify::recommended_watcher(move |event| drop(sender.send(event))).unwrap();
    let reader = read::Reader::new(directory.path().to_owned());
    let mut follower = Follower { inotify, watched: BTreeMap::new(), reader };
    follower.rewatch();
    follower.reader.load();
    // This one comes after all that reading gave.
    fs::write(&path, service("b")).unwrap();
    let first = loop {
        let sign = timeout(PATIENCE, signs.recv()).await.unwrap().unwrap();
        if follower.concerns(&sign) {
            break sign.unwrap();
        }
    };
    assert!(matches!(first.kind, EventKind::Modify(_)), "{first:?}");
}

#[tokio::test]
async fn nothing_there_is_an_error_at_start() {
    let error = watch(Path::new("/nonexistent/config"), settings()).err().unwrap();
    assert!(
        format!("{error:#}").starts_with("--config /nonexistent/config: cannot be read: No such file"),
        "{error:#}"
    );
}

#[test]
fn unchanged_objects_keep_their_arc() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("a.yaml"), service("a") + &service("b")).unwrap();
    let mut reader = read::Reader::new(directory.path().to_owned());
    let before = reader.load();
    fs::write(directory.path().join("a.yaml"), service("a") + &service("b").replace("80", "81")).unwrap();
    let after = reader.load();
    let same: Vec<_> = before
        .objects
        .services
        .iter()
        .map(|(key, old)| Arc::ptr_eq(old, &after.objects.services[key]))
        .collect();
    assert_eq!(same, [true, false]);
}
