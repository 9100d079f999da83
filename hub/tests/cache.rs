//! What the hub's own programs have downloaded is used, verified, and left as it is.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use crate::common::server::{Files, Server, digest};
use crate::common::{client_with, settings, shards};
use sluice_converter::{Options, convert, convert_plan, plan_source};
use sluice_hub::{Client, Filter, HubConversion, HubError, Observer, Pull, Settings};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden/mixtral");

/// A checkpoint of the fixtures in four shards.
fn files() -> Files {
    shards::of_folder(Path::new(GOLDEN), 4)
}

fn shard(number: usize) -> String {
    format!("model-{number:05}-of-00004.safetensors")
}

/// Lays files out as `huggingface_hub` does.
fn fill(cache: &Path, commit: &str, files: &Files) {
    let repo = cache.join("models--a--b");
    let (blobs, snapshot) = (repo.join("blobs"), repo.join("snapshots").join(commit));
    for folder in [&blobs, &snapshot, &repo.join("refs")] {
        fs::create_dir_all(folder).unwrap();
    }
    fs::write(repo.join("refs/main"), commit).unwrap();
    for (path, bytes) in files {
        let blob = digest(path, bytes);
        fs::write(blobs.join(&blob), bytes).unwrap();
        symlink(Path::new("../../blobs").join(blob), snapshot.join(path)).unwrap();
    }
}

/// Changes the last byte of what the cache has of a file.
fn damage(cache: &Path, commit: &str, path: &str) {
    let path = cache.join("models--a--b/snapshots").join(commit).join(path);
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(path, bytes).unwrap();
}

/// All that is in a folder.
fn content(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for path in fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
        if path.is_dir() {
            found.extend(content(&path));
        } else {
            found.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    found
}

#[derive(Debug, Default)]
struct Notes(Mutex<Vec<String>>);

impl Observer for Notes {
    fn expects(&self, _bytes: u64) {}
    fn arrived(&self, _bytes: u64) {}
    fn lost(&self, _bytes: u64) {}
    fn note(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
}

struct Place {
    folder: tempfile::TempDir,
    cache: PathBuf,
    server: Server,
    files: Files,
    commit: String,
}

impl Place {
    fn new() -> Place {
        let (folder, server, files) = (tempfile::tempdir().unwrap(), Server::start(), files());
        let commit = server.commit("a/b", files.clone());
        Place { cache: folder.path().join("cache"), folder, server, files, commit }
    }

    fn fill(&self, is_there: impl Fn(&str) -> bool) {
        let files = self.files.iter().filter(|(path, _)| is_there(path));
        fill(&self.cache, &self.commit, &files.map(|(path, bytes)| (path.clone(), bytes.clone())).collect());
    }

    fn client(&self) -> Arc<Client> {
        let settings = settings(&self.server.address, None);
        client_with(Settings { cache: Some(self.cache.clone()), ..settings })
    }

    /// A client that asks nobody.
    fn offline(&self) -> Arc<Client> {
        let settings = settings("http://127.0.0.1:9", None);
        client_with(Settings { cache: Some(self.cache.clone()), offline: true, ..settings })
    }

    fn convert(&self, client: Arc<Client>, keep: bool) -> Result<(Vec<u8>, Arc<Notes>), String> {
        let (dst, notes) = (self.folder.path().join("m.sluice"), Arc::new(Notes::default()));
        let reference = "hf:a/b".parse().unwrap();
        let observer = Arc::clone(&notes) as Arc<dyn Observer>;
        let hub = HubConversion::prepare(client, &reference, &dst, keep, observer).map_err(|e| e.to_string())?;
        let plan = plan_source(hub.source(), &Options::default()).map_err(|e| e.to_string())?;
        hub.begin().map_err(|e| e.to_string())?;
        convert_plan(&plan, &dst, &()).map_err(|e| e.to_string())?;
        let kept = hub.finish(&dst).map_err(|e| e.to_string())?;
        assert_eq!(kept.is_some(), keep);
        let bytes = fs::read(&dst).unwrap();
        fs::remove_file(dst).unwrap();
        Ok((bytes, notes))
    }

    fn local(&self) -> Vec<u8> {
        let (src, dst) = (self.folder.path().join("local"), self.folder.path().join("local.sluice"));
        fs::create_dir(&src).unwrap();
        self.files.iter().for_each(|(path, bytes)| fs::write(src.join(path), bytes).unwrap());
        convert(&src, &dst, &Options::default(), &()).unwrap();
        fs::read(dst).unwrap()
    }
}

#[test]
fn files_of_the_cache_are_not_downloaded() {
    let place = Place::new();
    // One is missing, and one is not what it was.
    place.fill(|path| path != shard(2));
    damage(&place.cache, &place.commit, &shard(3));
    let before = content(&place.cache);
    let (bytes, notes) = place.convert(place.client(), false).unwrap();
    assert!(bytes == place.local());
    assert!(content(&place.cache) == before, "the cache is left as it is");
    let notes = notes.0.lock().unwrap();
    assert!(matches!(&notes[..], [one] if one.contains(&shard(3)) && one.contains("cache")), "{notes:?}");
    let length = |number| place.files[&shard(number)].len() as u64;
    let served = place.server.seen().bytes.load(Ordering::Relaxed);
    // Headers are asked for, and the answers of the interface.
    let most = length(2) + length(3) + 4 * (128 << 10) + (64 << 10);
    assert!(served <= most, "{served} bytes were downloaded, {most} at most");
}

#[test]
fn what_is_kept_is_a_copy() {
    let place = Place::new();
    place.fill(|_| true);
    damage(&place.cache, &place.commit, &shard(1));
    let before = content(&place.cache);
    place.convert(place.client(), true).unwrap();
    let kept = place.folder.path().join("m.sluice.source");
    let pulled = place.folder.path().join("pulled");
    let pull = Pull::prepare(place.client(), &"a/b".parse().unwrap(), &pulled, &Filter::default()).unwrap();
    pull.run(Arc::new(())).unwrap();
    for (path, bytes) in &place.files {
        for folder in [&kept, &pulled] {
            assert!(fs::read(folder.join(path)).unwrap() == *bytes, "{path}");
            assert!(folder.join(path).symlink_metadata().unwrap().is_file(), "{path}");
        }
    }
    assert!(content(&place.cache) == before, "the cache is left as it is");
}

#[test]
fn without_the_hub_the_cache_is_enough() {
    let place = Place::new();
    let absent = place.offline().snapshot("a/b", "main").unwrap_err();
    assert!(matches!(absent, HubError::Offline { .. }), "{absent}");
    place.fill(|_| true);
    assert!(place.convert(place.offline(), false).unwrap().0 == place.local());
    let by_commit = place.offline().snapshot("a/b", &place.commit).unwrap();
    assert_eq!(by_commit, place.offline().snapshot("a/b", "main").unwrap());
    assert_eq!(by_commit.files, place.client().snapshot("a/b", "main").unwrap().files);
    let pulled = place.folder.path().join("pulled");
    let pull = Pull::prepare(place.offline(), &"a/b".parse().unwrap(), &pulled, &Filter::default()).unwrap();
    pull.run(Arc::new(())).unwrap();
    assert_eq!(content(&pulled).len(), place.files.len());
}

#[test]
fn without_the_hub_what_the_cache_has_not_is_an_error() {
    let place = Place::new();
    place.fill(|path| path != shard(2));
    let error = place.convert(place.offline(), false).unwrap_err();
    assert!(error.contains(&shard(2)), "{error}");
    let place = Place::new();
    place.fill(|_| true);
    damage(&place.cache, &place.commit, &shard(4));
    let error = place.convert(place.offline(), false).unwrap_err();
    assert!(error.contains(&shard(4)) && error.contains("HF_HUB_OFFLINE"), "{error}");
    damage(&place.cache, &place.commit, "config.json");
    let error = place.convert(place.offline(), false).unwrap_err();
    assert!(error.contains("config.json") && error.contains("HF_HUB_OFFLINE"), "{error}");
}
