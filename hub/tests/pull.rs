//! Repositories become folders, whatever the line does.

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use crate::common::server::{Faults, Files, Server, TOKEN};
use crate::common::{client, client_of, noise};
use sluice_hub::{Filter, HubError, Observer, Pull, Reference};

fn files(seed: u64) -> Files {
    let texts = ["config.json", "tokenizer.json", "README.md", "sub/notes.txt"];
    let texts = texts.map(|name| (name.to_owned(), format!("{{\"{name}\": {seed}}}").into_bytes()));
    let shards =
        (1..=3).map(|n| (format!("model-0000{n}-of-00003.safetensors"), noise(3_000_000 + n * 1001, seed + n as u64)));
    texts.into_iter().chain(shards).chain([("empty".to_owned(), Vec::new())]).collect()
}

fn reference(text: &str) -> Reference {
    text.parse().unwrap()
}

fn check(folder: &Path, files: &Files) {
    for (path, bytes) in files {
        assert!(fs::read(folder.join(path)).unwrap() == *bytes, "{path}");
    }
    fn count(folder: &Path) -> usize {
        let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
        entries.map(|p| if p.is_dir() { count(&p) } else { 1 }).sum()
    }
    assert_eq!(count(folder), files.len(), "nothing else is left");
}

/// Keeps what it hears.
#[derive(Debug, Default)]
struct Notes(Mutex<Vec<String>>, Mutex<i64>);

impl Observer for Notes {
    fn expects(&self, bytes: u64) {
        assert!(bytes > 0);
    }

    fn arrived(&self, bytes: u64) {
        *self.1.lock().unwrap() += bytes as i64;
    }

    fn lost(&self, bytes: u64) {
        *self.1.lock().unwrap() -= bytes as i64;
    }

    fn note(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
}

fn pull(server: &Server, name: &str, folder: &Path) -> Result<Arc<Notes>, HubError> {
    let pull = Pull::prepare(client(server), &reference(name), folder, &Filter::default())?;
    let notes = Arc::new(Notes::default());
    notes.0.lock().unwrap().extend(pull.notes().iter().cloned());
    let bytes = pull.bytes();
    pull.run(notes.clone())?;
    assert_eq!(*notes.1.lock().unwrap(), bytes as i64, "progress ends at the end");
    Ok(notes)
}

#[test]
fn a_repository_becomes_a_folder_and_is_not_fetched_twice() {
    let server = Server::start();
    server.commit("a/b", files(1));
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("b");
    pull(&server, "hf:a/b", &to).unwrap();
    check(&to, &files(1));
    let before = server.seen().bytes.load(Ordering::Relaxed);
    fs::write(to.join("config.json"), "{ damaged      }").unwrap();
    let notes = pull(&server, "a/b", &to).unwrap();
    check(&to, &files(1));
    assert!(server.seen().bytes.load(Ordering::Relaxed) - before < 10_000);
    assert!(notes.0.lock().unwrap().len() <= 1);
    // Later, the branch has other files.
    server.commit("a/b", files(5));
    pull(&server, "a/b", &to).unwrap();
    check(&to, &files(5));
}

#[test]
fn cut_lines_refusals_wrong_lengths_and_damage_are_overcome() {
    let server = Server::start();
    server.commit("a/b", files(1));
    server.rename("old/name", "a/b");
    server.faults(Faults { cut: 50, busy: 30, failing: 30, wrong_length: 50, expired: 30 });
    server.damage("model-00002-of-00003.safetensors", 1);
    let folder = tempfile::tempdir().unwrap();
    for name in ["a/b", "old/name"] {
        let to = folder.path().join(name);
        pull(&server, name, &to).unwrap();
        check(&to, &files(1));
    }
    let seen = server.seen();
    let count = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
    assert!(count(&seen.refused) > 5 && count(&seen.cut) > 5 && count(&seen.redirected) > 5, "{seen:?}");
}

#[test]
fn servers_without_listings_are_asked_for_each_file() {
    let server = Server::start();
    server.commit("a/b", files(1));
    server.without_listings();
    let folder = tempfile::tempdir().unwrap();
    pull(&server, "a/b", &folder.path().join("b")).unwrap();
    check(&folder.path().join("b"), &files(1));
}

#[test]
fn an_interrupted_download_goes_on_with_its_commit() {
    let server = Server::start();
    server.commit("a/b", files(1));
    let folder = tempfile::tempdir().unwrap();
    server.damage("model-00003-of-00003.safetensors", 99);
    let error = pull(&server, "a/b", folder.path()).unwrap_err();
    assert!(matches!(error, HubError::Damaged { attempts: 3, .. }), "{error}");
    server.commit("a/b", files(2));
    server.damage("model-00003-of-00003.safetensors", 0);
    let notes = pull(&server, "a/b", folder.path()).unwrap();
    check(folder.path(), &files(1));
    let notes = notes.0.lock().unwrap();
    assert!(notes.iter().any(|n| n.contains("has moved on")), "{notes:?}");
    // One that is complete follows the branch.
    drop(notes);
    pull(&server, "a/b", folder.path()).unwrap();
    check(folder.path(), &files(2));
}

#[test]
fn the_token_opens_gated_models_and_stays_with_the_hub() {
    let server = Server::start();
    server.commit("a/b", files(1));
    server.gate("a/b");
    let folder = tempfile::tempdir().unwrap();
    let error = pull(&server, "a/b", &folder.path().join("x")).unwrap_err();
    assert!(matches!(&error, HubError::Gated { has_token: false, page, .. } if page.ends_with("/a/b")), "{error}");
    assert!(!folder.path().join("x").exists(), "nothing is left of a refusal");
    let with_token = client_of(&server.address, Some(TOKEN));
    Pull::prepare(with_token, &reference("a/b"), folder.path(), &Filter::default()).unwrap().run(Arc::new(())).unwrap();
    check(folder.path(), &files(1));
    assert!(!server.seen().token_leaked.load(Ordering::Relaxed));
}

#[test]
fn what_is_not_there_is_named() {
    let server = Server::start();
    server.commit("a/b", files(1));
    let folder = tempfile::tempdir().unwrap();
    let error = |name: &str| pull(&server, name, &folder.path().join("x")).unwrap_err().to_string();
    assert!(error("a/c").contains("token"), "{}", error("a/c"));
    assert!(error("a/b@v9").contains("revision"), "{}", error("a/b@v9"));
    assert!(error("a/b:Q4_K_M").contains("GGUF"), "{}", error("a/b:Q4_K_M"));
    let with_token = client_of(&server.address, Some(TOKEN));
    let absent = with_token.snapshot("a/c", "main").unwrap_err();
    assert!(matches!(absent, HubError::Absent { .. }), "{absent}");
    let nobody = client_of("http://127.0.0.1:9", None).snapshot("a/b", "main").unwrap_err();
    assert!(matches!(nobody, HubError::Unreachable { .. }), "{nobody}");
}

#[test]
fn revisions_are_branches_tags_requests_and_commits() {
    let server = Server::start();
    let first = server.commit("a/b", files(1));
    server.commit("a/b", files(2));
    for name in ["v1.0", "refs/pr/1", "feature/x"] {
        server.name("a/b", name, &first);
    }
    let folder = tempfile::tempdir().unwrap();
    for revision in ["v1.0", "refs/pr/1", "feature/x", &first] {
        let to = folder.path().join(revision.replace('/', "_"));
        pull(&server, &format!("a/b@{revision}"), &to).unwrap();
        check(&to, &files(1));
    }
}

#[test]
fn a_commit_that_is_gone_is_an_error_that_says_what_to_do() {
    let server = Server::start();
    server.commit("a/b", files(1));
    let folder = tempfile::tempdir().unwrap();
    server.damage("model-00003-of-00003.safetensors", 99);
    pull(&server, "a/b", folder.path()).unwrap_err();
    server.commit("a/b", files(2));
    server.forget("a/b");
    let error = pull(&server, "a/b", folder.path()).unwrap_err().to_string();
    assert!(error.contains("no longer has the commit") && error.contains("begin anew"), "{error}");
}

#[test]
fn names_that_downloads_need_are_refused() {
    let server = Server::start();
    for path in [".sluice-download", "config.json.partial", "config.json.partial.pieces"] {
        server.commit("a/b", files(1).into_iter().chain([(path.to_owned(), b"x".to_vec())]).collect());
        let folder = tempfile::tempdir().unwrap();
        let error = pull(&server, "a/b", &folder.path().join("x")).unwrap_err().to_string();
        assert!(error.contains(&format!("--exclude '{path}'")), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing was begun");
    }
}

#[test]
fn a_folder_of_the_user_stays_where_nothing_comes_to_it() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    pull(&server, "a/b", folder.path()).unwrap_err();
    assert!(folder.path().is_dir());
    // A link to a folder is a folder.
    server.commit("a/b", files(1));
    let link = folder.path().join("link");
    fs::create_dir(folder.path().join("there")).unwrap();
    std::os::unix::fs::symlink("there", &link).unwrap();
    pull(&server, "a/b", &link).unwrap();
    check(&folder.path().join("there"), &files(1));
    // A link to a file is nobody's download.
    fs::remove_file(link.join("config.json")).unwrap();
    std::os::unix::fs::symlink("tokenizer.json", link.join("config.json")).unwrap();
    let error = pull(&server, "a/b", &link).unwrap_err();
    assert!(matches!(error, HubError::InTheWay { .. }), "{error}");
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let server = Server::start();
    for path in ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil"] {
        let mut files = files(1);
        files.insert(path.to_owned(), b"x".to_vec());
        server.commit("a/b", files);
        let folder = tempfile::tempdir().unwrap();
        let error = pull(&server, "a/b", &folder.path().join("x")).unwrap_err();
        assert!(matches!(error, HubError::StrangeName { .. }), "{error}");
    }
}

#[test]
fn a_server_that_is_always_busy_is_left_alone_in_the_end() {
    let server = Server::start();
    server.commit("a/b", files(1));
    server.faults(Faults { busy: 1000, ..Faults::default() });
    let error = client(&server).snapshot("a/b", "main").unwrap_err();
    assert!(matches!(error, HubError::Busy { .. }), "{error}");
    server.faults(Faults { wrong_length: 1000, ..Faults::default() });
    let folder = tempfile::tempdir().unwrap();
    let error = pull(&server, "a/b", folder.path()).unwrap_err();
    assert!(matches!(error, HubError::Unreachable { .. }), "{error}");
}
