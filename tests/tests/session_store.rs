//! Sessions in a folder: found, restored with the same bits, written once, and limited in size, whatever happens to the files.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use proptest::prelude::*;
use sluice_model::session::{SessionError, peek};
use sluice_model::{Engine, EngineOptions, KvType, Sequence};
use sluice_sessions::{SessionEntry, Store, StoreError, StoreOptions};
use sluice_tests::{Converted, Golden};
use tempfile::TempDir;

/// Layers that see everything, layers with windows, and recurrent states.
const FAMILIES: [&str; 3] = ["deepseek_v3", "mixtral_swa", "qwen3_next"];

fn options(folder: &Path) -> StoreOptions {
    StoreOptions { folder: folder.to_owned(), max_bytes: 1 << 30, expire_after: None }
}

fn engine_options() -> EngineOptions {
    EngineOptions {
        context: Some(250),
        sequences: Some(12),
        marks: 2,
        mark_every: Some(10_000),
        kv_type: KvType::F16,
        forget: true,
        ..EngineOptions::default()
    }
}

fn tokens(family: &str) -> Vec<u32> {
    let ids = Golden::load(family).ids("input_ids");
    ids.iter().copied().cycle().enumerate().map(|(i, id)| (id + i as u32 / 50) % 90).take(250).collect()
}

/// A text that diverges from another one.
fn parted(tokens: &[u32], at: usize) -> Vec<u32> {
    let parts = |(i, token): (usize, &u32)| if i < at { *token } else { (token + 1) % 90 };
    tokens.iter().enumerate().map(parts).collect()
}

/// A model, an engine and a folder.
struct House {
    engine: Engine,
    folder: TempDir,
    tokens: Vec<u32>,
    _model: Converted,
}

impl House {
    fn new(family: &str) -> House {
        let model = Converted::new(&format!("golden/{family}"), None);
        let (engine, folder) = (model.open(&engine_options()), tempfile::tempdir().unwrap());
        House { engine, folder, tokens: tokens(family), _model: model }
    }

    /// A house in which 100 and 150 tokens of its text have been kept. Returns the two files.
    fn with_two(family: &str) -> (House, Vec<u32>, [PathBuf; 2]) {
        let mut house = House::new(family);
        let (store, tokens) = (house.store(), house.tokens.clone());
        house.keep(&store, &tokens[..100]);
        house.keep(&store, &tokens[..150]);
        let files = [100, 150].map(|tokens| house.file_of(&of_tokens(&store, tokens)));
        (house, tokens, files)
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("sessions")
    }

    fn store(&self) -> Store {
        Store::open(options(&self.path())).unwrap()
    }

    fn read(&mut self, tokens: &[u32]) -> Sequence {
        let mut sequence = self.engine.new_sequence();
        self.append(&mut sequence, tokens);
        sequence
    }

    fn append(&mut self, sequence: &mut Sequence, tokens: &[u32]) {
        self.engine.forward(sequence, tokens, &mut Vec::new()).unwrap();
    }

    /// Reads and keeps a text.
    fn keep(&mut self, store: &Store, tokens: &[u32]) {
        let sequence = self.read(tokens);
        store.keep(sequence, None);
        store.flush();
    }

    fn logits(&mut self, sequence: &mut Sequence, tokens: &[u32]) -> Vec<f32> {
        let mut all = Vec::new();
        self.engine.forward_all(sequence, tokens, &mut |_, row| all.extend_from_slice(row)).unwrap();
        all
    }

    /// How many tokens of a text are restored; checks the bits that follow.
    fn restored(&mut self, store: &Store, text: &[u32]) -> usize {
        let Some(found) = store.longest(self.engine.binding(), text) else { return 0 };
        let mut back = store.restore(&self.engine, &found).unwrap();
        let at = back.position();
        assert_eq!((at, back.tokens()), (found.position(), &text[..at]));
        let next = (text.len() - at).min(5);
        if next == 0 {
            return at;
        }
        let mut alone = self.read(&text[..at]);
        let want = self.logits(&mut alone, &text[at..at + next]);
        assert!(self.logits(&mut back, &text[at..at + next]) == want, "other bits after {at} tokens");
        at
    }

    /// The names in the folder that are those of sessions.
    fn files(&self) -> BTreeSet<String> {
        let names = fs::read_dir(self.path()).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.ends_with(".session")).collect()
    }

    fn file_of(&self, entry: &SessionEntry) -> PathBuf {
        self.path().join(format!("{}.session", entry.id))
    }
}

/// The session with this many tokens.
fn of_tokens(store: &Store, tokens: usize) -> SessionEntry {
    store.list().into_iter().find(|entry| entry.tokens == tokens).expect("there is such a session")
}

#[test]
fn later_turns_write_only_what_is_new_and_survive_a_restart() {
    for family in FAMILIES {
        let mut house = House::new(family);
        let (store, tokens) = (house.store(), house.tokens.clone());
        let mut sequence = house.read(&tokens[..100]);
        store.keep(sequence.fork(), Some("first\nturn"));
        house.append(&mut sequence, &tokens[100..150]);
        store.flush();
        store.keep(sequence.fork(), Some("second turn"));
        store.flush();
        let entries = store.list();
        let saved: Vec<_> = entries.iter().map(|e| (e.tokens, e.title.as_deref())).collect();
        assert_eq!(saved, [(150, Some("second turn")), (100, Some("first turn"))], "{family}");
        assert_eq!(entries[0].parent.as_ref(), Some(&entries[1].id));
        assert_eq!(entries[1].children, [entries[0].id.clone()]);
        let second = peek(&house.file_of(&entries[0])).unwrap();
        assert_eq!((second.start, second.bytes), (64, sequence.saved_len(64).unwrap()));
        if family == "deepseek_v3" {
            // 86 tokens instead of 150, and the fixed part of every file.
            let whole = sequence.saved_len(0).unwrap();
            assert!(second.bytes < whole * 60 / 100, "{} of {whole} bytes", second.bytes);
        }
        // What is stored is not written again.
        store.keep(sequence.fork(), None);
        store.flush();
        assert_eq!((store.usage().written, store.usage().files, store.usage().errors), (2, 2, 0));
        drop(sequence);
        assert_eq!(house.restored(&store, &tokens), 150);
        let usage = store.usage();
        drop(store);
        assert!(house.engine.pages().iter().all(|pages| pages.free == pages.total));
        let store = house.store();
        assert_eq!((store.usage().bytes, store.usage().files, store.usage().unusable), (usage.bytes, 2, 0));
        assert_eq!(house.restored(&store, &tokens), 150);
        let entry = of_tokens(&store, 150);
        assert_eq!((entry.title.as_deref(), entry.uses), (Some("second turn"), 3), "{family}");
        assert_eq!(entry.state_id(), house.engine.file().state_id());
    }
}

#[test]
fn a_text_that_parts_inside_a_segment_continues_it_from_a_page_boundary() {
    for family in FAMILIES {
        let mut house = House::new(family);
        let (store, tokens) = (house.store(), house.tokens.clone());
        let mut trunk = house.read(&tokens[..120]);
        trunk.mark().unwrap();
        house.append(&mut trunk, &tokens[120..230]);
        store.keep(trunk, None);
        let branch = parted(&tokens, 150);
        house.keep(&store, &branch[..200]);
        let (trunk, saved) = (of_tokens(&store, 230), of_tokens(&store, 200));
        assert_eq!((&saved.parent, peek(&house.file_of(&saved)).unwrap().start), (&Some(trunk.id), 128));
        let forgets = family != "deepseek_v3";
        assert_eq!(house.restored(&store, &branch), 200, "{family}");
        assert_eq!(house.restored(&store, &tokens), 230, "{family}");
        assert_eq!(house.restored(&store, &parted(&tokens, 140)), if forgets { 120 } else { 140 }, "{family}");
        assert_eq!(house.restored(&store, &tokens[..60]), if forgets { 0 } else { 60 });
        let found = store.longest(house.engine.binding(), &tokens[..160]).unwrap();
        assert_eq!((found.matched(), found.position()), (160, if forgets { 120 } else { 160 }));
        assert!(store.longest(Default::default(), &tokens).is_none(), "another model's");
        // If the middle is already stored, storing it again can be worth a few pages, for its windows and states.
        house.keep(&store, &tokens[..200]);
        assert_eq!(store.usage().files, if forgets { 3 } else { 2 });
        assert_eq!(house.restored(&store, &tokens[..205]), if forgets { 200 } else { 205 });
    }
}

#[test]
fn the_texts_of_all_that_nothing_continues_are_known_after_a_restart() {
    let mut house = House::new("deepseek_v3");
    let (store, tokens) = (house.store(), house.tokens.clone());
    let other = parted(&tokens[..120], 70);
    house.keep(&store, &tokens[..80]);
    house.keep(&store, &tokens[..150]);
    house.keep(&store, &other);
    drop(store);
    let store = house.store();
    let mut texts = store.texts(house.engine.binding());
    texts.sort_by_key(Vec::len);
    assert_eq!(texts, [other, tokens[..150].to_vec()]);
    let foreign = house.engine.binding();
    let foreign = sluice_model::session::Binding { exact: !foreign.exact, ..foreign };
    assert!(store.texts(foreign).is_empty());
}

#[test]
fn the_least_useful_leaves_go_first() {
    let mut house = House::new("deepseek_v3");
    let tokens = house.tokens.clone();
    let texts: Vec<_> =
        (0..4).map(|i| (0..100).map(|j| if j < 64 { tokens[j] } else { i }).collect::<Vec<u32>>()).collect();
    let store = house.store();
    texts.iter().for_each(|text| house.keep(&store, text));
    let (bytes, one) = (store.usage().bytes, of_tokens(&store, 100).bytes);
    drop(store);
    // There is just enough room for these.
    let store = Store::open(StoreOptions { max_bytes: bytes, ..options(&house.path()) }).unwrap();
    assert_eq!(store.usage().files, 4);
    let binding = house.engine.binding();
    store.touch(binding, &texts[1]);
    // While it is in use it stays, although it was used least.
    let held = store.longest(binding, &texts[2]).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    store.touch(binding, &texts[1]);
    let other = parted(&tokens, 0);
    house.keep(&store, &other[..36]);
    let stored = |text: &[u32]| store.longest(binding, text).map_or(0, |found| found.matched());
    assert_eq!([0, 1, 2, 3].map(|i| stored(&texts[i])), [100, 100, 100, 64], "the first has the common beginning");
    assert_eq!((stored(&other), store.usage().deleted), (36, 1));
    assert!(store.usage().bytes <= bytes);
    drop(held);
    drop(store);
    // A smaller limit is enforced at once.
    let store = Store::open(StoreOptions { max_bytes: bytes - 2 * one, ..options(&house.path()) }).unwrap();
    store.flush();
    assert!(store.usage().bytes <= bytes - 2 * one);
    assert_eq!(house.restored(&store, &texts[1]), 100, "what was used most");
    drop(store);
    let store = Store::open(StoreOptions { expire_after: Some(Duration::ZERO), ..options(&house.path()) }).unwrap();
    store.flush();
    assert_eq!((store.usage().files, store.usage().bytes, house.files().len()), (0, 0, 0));
    drop(store);
    // What does not fit at all is not written, and nothing is deleted to make room.
    let store = house.store();
    house.keep(&store, &tokens[..20]);
    drop(store);
    let store = Store::open(StoreOptions { max_bytes: 2 * one, ..options(&house.path()) }).unwrap();
    store.keep(house.read(&tokens), None);
    store.flush();
    assert!(matches!(*store.last_error().unwrap(), StoreError::Full { tokens: 250, most, .. } if most == 2 * one));
    assert_eq!((store.usage().files, store.usage().errors), (1, 1));
}

#[test]
fn files_are_private_and_the_folder_belongs_to_one() {
    let mut house = House::new("deepseek_v3");
    let (store, tokens) = (house.store(), house.tokens.clone());
    house.keep(&store, &tokens[..70]);
    let mode = |path: &Path| fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&house.path()), 0o700);
    for entry in fs::read_dir(house.path()).unwrap() {
        assert_eq!(mode(&entry.unwrap().path()), 0o600);
    }
    assert!(matches!(Store::open(options(&house.path())), Err(StoreError::Busy { .. })));
    drop(store);
    drop(house.store());
    let file = house.folder.path().join("file");
    fs::write(&file, "no folder").unwrap();
    assert!(matches!(Store::open(options(&file)), Err(StoreError::Folder { .. })));
    assert_eq!(fs::read(&file).unwrap(), b"no folder");
}

#[test]
fn sessions_are_deleted_by_ids_that_are_known() {
    let mut house = House::new("deepseek_v3");
    let (store, tokens) = (house.store(), house.tokens.clone());
    house.keep(&store, &tokens[..100]);
    house.keep(&store, &tokens[..200]);
    house.keep(&store, &parted(&tokens, 10)[..70]);
    let victim = house.path().join("precious.session");
    fs::write(&victim, "precious").unwrap();
    for strange in ["", "precious", "../sessions/precious", "/etc/passwd", &"0".repeat(32), &"A".repeat(32), "\0"] {
        assert!(!store.delete(strange).unwrap(), "{strange}");
    }
    let root = of_tokens(&store, 100);
    assert!(store.delete(&root.id).unwrap());
    assert!(!store.delete(&root.id).unwrap());
    assert_eq!((store.list().len(), store.usage().files, house.files().len()), (1, 1, 2));
    assert_eq!(house.restored(&store, &tokens), 10);
    assert_eq!(fs::read(&victim).unwrap(), b"precious");
}

#[test]
fn what_others_and_crashes_have_left_harms_nothing() {
    let (mut house, tokens, [first, second]) = House::with_two("qwen3_next");
    let outside = house.folder.path().join("outside");
    fs::copy(&first, &outside).unwrap();
    let folder = house.path();
    let beside = |name: &str| folder.join(name);
    let half = fs::read(&second).unwrap();
    let left = [
        format!("{}.12345-0", first.file_name().unwrap().to_str().unwrap()),
        format!("{}.session.1-7", "f".repeat(32)),
        "sessions.json.12-3".to_owned(),
    ];
    left[..2].iter().for_each(|name| fs::write(beside(name), &half[..half.len() / 2]).unwrap());
    fs::write(beside(&left[2]), r#"{"sess"#).unwrap();
    let foreign =
        [format!("{}.session", "e".repeat(32)), "notes.txt".to_owned(), format!("{}.session.1-8", "f".repeat(32))];
    foreign.iter().for_each(|name| fs::write(beside(name), "somebody's").unwrap());
    let link = beside(&format!("{}.session", "d".repeat(32)));
    symlink(&outside, &link).unwrap();
    // A session under another name.
    let renamed = beside(&format!("{}.session", "c".repeat(32)));
    fs::copy(&first, &renamed).unwrap();
    fs::create_dir(beside(&format!("{}.session", "b".repeat(32)))).unwrap();
    fs::write(beside("sessions.json"), "{ damaged").unwrap();
    let store = house.store();
    assert_eq!((store.usage().files, store.usage().unusable), (3, 1));
    assert_eq!(house.restored(&store, &tokens), 150);
    assert!(left.iter().all(|name| !beside(name).exists()));
    assert!(foreign.iter().all(|name| fs::read(beside(name)).unwrap() == b"somebody's"));
    assert!(link.is_symlink() && outside.exists());
    // A link in place of a session is not followed, and what continues that session is no longer used.
    fs::remove_file(&first).unwrap();
    symlink(&outside, &first).unwrap();
    let found = store.longest(house.engine.binding(), &tokens).unwrap();
    assert!(matches!(store.restore(&house.engine, &found), Err(StoreError::Session(SessionError::Open { .. }))));
    store.flush();
    assert!(store.longest(house.engine.binding(), &tokens).is_none());
    assert!(!first.exists() && !second.exists() && outside.exists());
    house.keep(&store, &tokens[..150]);
    assert_eq!(house.restored(&store, &tokens), 150);
}

#[test]
fn a_file_that_was_whole_when_its_writer_was_killed_gets_its_name() {
    let (mut house, tokens, [first, second]) = House::with_two("qwen3_next");
    let unfinished = |path: &Path, suffix: &str| PathBuf::from(format!("{}{suffix}", path.display()));
    let sound = fs::read(&second).unwrap();
    // One that a crash has cut off, one whose name says another text, one of a text that is there, and two of one that is not.
    fs::write(unfinished(&second, ".77-0"), &sound[..sound.len() - 1]).unwrap();
    let strange = house.path().join(format!("{}.session.77-1", "a".repeat(32)));
    fs::copy(&second, &strange).unwrap();
    fs::copy(&first, unfinished(&first, ".77-2")).unwrap();
    fs::rename(&second, unfinished(&second, ".77-3")).unwrap();
    fs::write(unfinished(&second, ".77-4"), &sound).unwrap();
    let store = house.store();
    assert_eq!((store.usage().files, store.usage().unusable), (2, 0));
    assert_eq!(house.restored(&store, &tokens), 150);
    assert_eq!(fs::read(&second).unwrap(), sound);
    assert!(!strange.exists());
    assert_eq!(house.files().len(), 2, "{:?}", house.files());
}

#[test]
fn a_file_that_is_cut_off_anywhere_is_not_used() {
    let (mut house, tokens, [first, second]) = House::with_two("mixtral_swa");
    for (path, left) in [(&second, 100), (&first, 0)] {
        let sound = fs::read(path).unwrap();
        for at in (0..sound.len()).step_by(sound.len() / 30).chain([127, 128, 160, sound.len() - 1]) {
            fs::write(path, &sound[..at]).unwrap();
            let store = house.store();
            assert_eq!(house.restored(&store, &tokens), left, "cut off at {at}");
            // Without its beginning, the second is useless too.
            assert_eq!(store.usage().unusable, if left == 0 { 2 } else { 1 });
        }
        fs::write(path, &sound).unwrap();
    }
    let store = house.store();
    assert_eq!((house.restored(&store, &tokens), store.usage().unusable), (150, 0));
}

#[test]
fn damage_is_found_and_deleted_with_what_continues_it() {
    for family in FAMILIES {
        let mut house = House::new(family);
        let (store, tokens) = (house.store(), house.tokens.clone());
        for end in [100, 150, 230] {
            house.keep(&store, &tokens[..end]);
        }
        let path = house.file_of(&of_tokens(&store, 150));
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.len() - 200;
        bytes[at] ^= 0x10;
        fs::write(&path, &bytes).unwrap();
        let found = store.longest(house.engine.binding(), &tokens).unwrap();
        assert_eq!(found.position(), 230);
        match store.restore(&house.engine, &found) {
            Err(StoreError::Session(SessionError::Damaged { path: damaged, .. })) => {
                assert_eq!(damaged.file_name(), path.file_name());
                store.flush();
                assert_eq!((house.files().len(), house.restored(&store, &tokens)), (1, 100));
            }
            // Windows and states in the middle of a chain are not read.
            Ok(back) => {
                assert_eq!((family != "deepseek_v3", back.position()), (true, 230));
                let found = store.longest(house.engine.binding(), &tokens[..150]).unwrap();
                assert!(matches!(store.restore(&house.engine, &found), Err(StoreError::Session(_))));
                store.flush();
                assert_eq!(house.files().len(), 1);
            }
            Err(other) => panic!("{family}: {other}"),
        }
        assert_eq!(store.usage().deleted, 2);
        assert!(house.engine.pages().iter().all(|pages| pages.free == pages.total));
    }
}

#[test]
fn mutated_files_give_the_right_bits_or_none() {
    let (house, tokens, _) = House::with_two("qwen3_next");
    let names: Vec<_> = house.files().into_iter().collect();
    let sound: Vec<_> = names.iter().map(|name| fs::read(house.path().join(name)).unwrap()).collect();
    let house = Mutex::new(house);
    let change = (0..2_usize, any::<prop::sample::Index>(), 0..4_u8, any::<u8>());
    proptest!(ProptestConfig::with_cases(60), |(changes in prop::collection::vec(change, 1..4))| {
        let mut house = house.lock().unwrap();
        let mut files = sound.clone();
        for (which, at, how, value) in changes {
            let file = &mut files[which];
            let at = at.index(file.len());
            match how {
                0 => file[at] = value,
                1 => file.truncate(at + 1),
                2 => file.insert(at, value),
                _ => file[at.min(119)] ^= value,
            }
        }
        for (name, file) in names.iter().zip(&files) {
            fs::write(house.path().join(name), file).unwrap();
        }
        let store = house.store();
        if let Some(found) = store.longest(house.engine.binding(), &tokens)
            && let Ok(back) = store.restore(&house.engine, &found)
        {
            let mut saved = Vec::new();
            back.save(&mut saved).unwrap();
            let mut want = Vec::new();
            house.read(&tokens[..back.position()]).save(&mut want).unwrap();
            prop_assert!(saved == want);
        }
    });
}

/// One thread keeps forks while the engine runs, and another looks sessions up and restores them.
#[test]
fn several_threads_use_a_store() {
    let mut house = House::new("qwen3_next");
    let (store, tokens) = (house.store(), house.tokens.clone());
    let texts: Vec<_> = [0, 30, 100].iter().map(|&at| parted(&tokens, at)).collect();
    let binding = house.engine.binding();
    std::thread::scope(|scope| {
        let looking = scope.spawn(|| {
            let mut most = 0;
            for round in 0..300 {
                for text in &texts {
                    most = most.max(store.longest(binding, text).map_or(0, |found| found.position()));
                }
                if round % 50 == 0 {
                    store.flush();
                    store.list().iter().for_each(|entry| assert_eq!(entry.binding, binding));
                }
            }
            most
        });
        for text in &texts {
            let mut sequence = house.engine.new_sequence();
            for part in text.chunks(23) {
                house.append(&mut sequence, part);
                store.keep(sequence.fork(), None);
            }
        }
        looking.join().unwrap();
    });
    store.flush();
    assert_eq!((store.usage().errors, store.usage().waiting), (0, 0));
    for text in &texts {
        assert_eq!(house.restored(&store, text), 250);
    }
    drop(store);
    assert!(house.engine.pages().iter().all(|pages| pages.free == pages.total));
    let store = house.store();
    assert_eq!(store.usage().unusable, 0);
    for text in &texts {
        assert_eq!(house.restored(&store, text), 250);
    }
}

#[test]
fn a_folder_that_fails_hurts_nobody() {
    let mut house = House::new("deepseek_v3");
    let (store, tokens) = (house.store(), house.tokens.clone());
    house.keep(&store, &tokens[..100]);
    fs::remove_dir_all(house.path()).unwrap();
    house.keep(&store, &tokens[..200]);
    assert!(store.usage().errors > 0 && store.last_error().is_some());
    let found = store.longest(house.engine.binding(), &tokens).unwrap();
    assert!(matches!(store.restore(&house.engine, &found), Err(StoreError::Session(SessionError::Open { .. }))));
    store.flush();
    assert!(store.longest(house.engine.binding(), &tokens).is_none());
    drop(store);
    assert!(house.engine.pages().iter().all(|pages| pages.free == pages.total));
}

/// Where the child keeps its sessions; if it is not set, the process is not the child.
const CHILD: &str = "SLUICE_TEST_STORE";

/// Not a test of its own: the process that the next test kills. It keeps sessions until then.
#[test]
fn child() {
    let Ok(path) = std::env::var(CHILD) else { return };
    let folder = Path::new(&path);
    let mut engine = Engine::open(&folder.with_file_name("model.sluice"), &engine_options()).unwrap();
    let store = Store::open(StoreOptions { max_bytes: 400_000, ..options(folder) }).unwrap();
    let tokens = tokens("qwen3_next");
    for turn in 0.. {
        let text = parted(&tokens, turn * 37 % 240);
        let mut sequence = engine.new_sequence();
        for part in text.chunks(60 + turn % 50) {
            engine.forward(&mut sequence, part, &mut Vec::new()).unwrap();
            store.keep(sequence.fork(), None);
        }
        store.flush();
    }
}

#[test]
fn what_was_kept_survives_a_kill_at_any_moment() {
    let model = Converted::new("golden/qwen3_next", None);
    let folder = model.path.with_file_name("sessions");
    let mut engine = model.open(&engine_options());
    let (binding, mut restored) = (engine.binding(), 0);
    for round in 0..12 {
        let whole = |f: &fs::DirEntry| f.path().extension().is_some_and(|e| e == "session" || e == "json");
        let modified = |f: fs::DirEntry| f.metadata().and_then(|found| found.modified()).ok();
        let of = |files: fs::ReadDir| files.flatten().filter(whole).filter_map(modified).max();
        let last = || fs::read_dir(&folder).map_or(None, of);
        let before = last();
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "session_store::child"])
            .env(CHILD, &folder)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // At any moment after something new is there.
        while last() == before {
            assert!(child.try_wait().unwrap().is_none(), "the child ended by itself");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(11 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let store = Store::open(options(&folder)).unwrap();
        let usage = store.usage();
        assert_eq!((usage.unusable, usage.errors), (0, 0));
        let left = fs::read_dir(&folder).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap());
        assert!(left.filter(|name| name.contains(".session.")).count() == 0, "what was left is removed");
        for turn in 0..60 {
            let text = parted(&tokens("qwen3_next"), turn * 37 % 240);
            let Some(found) = store.longest(binding, &text) else { continue };
            let back = store.restore(&engine, &found).unwrap();
            let (mut saved, mut want) = (Vec::new(), Vec::new());
            back.save(&mut saved).unwrap();
            let mut alone = engine.new_sequence();
            engine.forward(&mut alone, &text[..back.position()], &mut Vec::new()).unwrap();
            alone.save(&mut want).unwrap();
            assert!(saved == want);
            restored += 1;
        }
    }
    assert!(restored >= 12, "{restored}");
}
