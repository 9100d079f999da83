//! Conversations: messages and answers, and the files in which they are kept.
//!
//! A conversation is a JSON file `NAME.json` in a folder. The file is replaced as a whole before and after every answer, so a
//! program that is killed loses at most the running answer. It is locked while a chat has it open.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sluice_format::open_no_link;
use sluice_text::Message;

use crate::chat::settings::Choices;
use crate::error::CliError;

/// Version of the files.
const VERSION: u32 = 1;
/// Most bytes of a file.
const MOST_BYTES: u64 = 256 << 20;
/// Most characters of a name.
const LONGEST_NAME: usize = 64;
/// Prefix of the name of an unnamed conversation, before a number.
const UNNAMED: &str = "chat-";

/// Messages and answers, and how answers are made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Conversation {
    version: u32,
    /// The state id of its model.
    pub(crate) model: String,
    /// When it began, in seconds since 1970. Templates get this time, so that the prompt is the same on another day.
    pub(crate) begun: i64,
    /// The system message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) system: Option<String>,
    /// Messages and answers.
    pub(crate) turns: Vec<Turn>,
    /// How answers are made.
    pub(crate) settings: Choices,
    /// Answers so far, including those that were removed.
    pub(crate) answers: u64,
}

/// A message and its answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Turn {
    /// The user's text.
    pub(crate) message: String,
    /// The model's text; `None` if the program ended before there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) answer: Option<Said>,
}

/// An answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Said {
    /// The thinking.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) thinking: String,
    /// The text.
    pub(crate) text: String,
}

impl Conversation {
    /// An empty one with a model.
    pub(crate) fn new(model: String, system: Option<String>, settings: Choices) -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let begun = since.map_or(0, |since| since.as_secs() as i64);
        Conversation { version: VERSION, model, begun, system, turns: Vec::new(), settings, answers: 0 }
    }

    /// An empty one with the same model, system message and settings.
    pub(crate) fn anew(&self) -> Self {
        Self::new(self.model.clone(), self.system.clone(), self.settings.clone())
    }

    /// The messages in the form that templates take.
    pub(crate) fn messages(&self) -> Vec<Message> {
        let mut messages: Vec<Message> = self.system.iter().map(|text| Message::new("system", text)).collect();
        for turn in &self.turns {
            messages.push(Message::new("user", &turn.message));
            if let Some(Said { thinking, text }) = &turn.answer {
                let mut answer = Message::new("assistant", text);
                if !thinking.is_empty() {
                    answer.fields.insert("reasoning_content".into(), Value::from(thinking.as_str()));
                }
                messages.push(answer);
            }
        }
        messages
    }
}

/// The folder of the conversations.
#[derive(Clone, Debug)]
pub(crate) struct Folder(PathBuf);

/// The place of a conversation. No other program can open it while this exists.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) name: String,
    /// The file, locked.
    _file: File,
}

/// A conversation in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) name: String,
    pub(crate) changed: SystemTime,
    /// Messages of the user.
    pub(crate) turns: usize,
    /// The first message.
    pub(crate) first: String,
}

impl Folder {
    /// Opens the folder; creates it if necessary, readable only by its owner.
    ///
    /// # Errors
    /// The filesystem's error.
    pub(crate) fn open(path: &Path) -> Result<Self, CliError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.map_err(CliError::file(path, "make this folder"))?;
        Ok(Folder(path.to_owned()))
    }

    /// Loads the conversation with a name, and locks it.
    ///
    /// # Errors
    /// If there is none, another program has it open, or its file is not a conversation.
    pub(crate) fn load(&self, name: &str) -> Result<(Conversation, Kept), CliError> {
        let path = self.path(name)?;
        let mut file = loop {
            let file = open_no_link(&path).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => CliError::Failure(self.missing(name)),
                _ => CliError::file(&path, "read this conversation")(error),
            })?;
            lock(&file, &path)?;
            // The program that had it open may have replaced it meanwhile.
            let same =
                |here: &fs::Metadata, there: &fs::Metadata| (here.dev(), here.ino()) == (there.dev(), there.ino());
            if let (Ok(here), Ok(there)) = (file.metadata(), path.symlink_metadata())
                && !same(&here, &there)
            {
                continue;
            }
            break file;
        };
        let conversation = read(&mut file).map_err(CliError::file(&path, "read this conversation"))?;
        Ok((conversation, Kept { name: name.to_owned(), _file: file }))
    }

    /// Writes a conversation under a name that no other one has. Without a name, it gets one with a number.
    ///
    /// # Errors
    /// If the name is taken, or the filesystem's error.
    pub(crate) fn create(&self, name: Option<&str>, conversation: &Conversation) -> Result<Kept, CliError> {
        if let Some(name) = name {
            let path = self.path(name)?;
            return match self.written(conversation)?.persist_noclobber(&path) {
                Ok(file) => Ok(Kept { name: name.to_owned(), _file: file }),
                Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
                    Err(CliError::Failure(format!("there is a conversation `{name}` already: choose another name")))
                }
                Err(error) => Err(CliError::file(&path, "write this conversation")(error.error)),
            };
        }
        let taken = self.names()?.into_iter().filter_map(|name| name.strip_prefix(UNNAMED)?.parse::<u64>().ok());
        let mut number = taken.max().unwrap_or(0);
        let mut written = self.written(conversation)?;
        loop {
            number += 1;
            let name = format!("{UNNAMED}{number}");
            let path = self.path(&name)?;
            match written.persist_noclobber(&path) {
                Ok(file) => return Ok(Kept { name, _file: file }),
                Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => written = error.file,
                Err(error) => return Err(CliError::file(&path, "write this conversation")(error.error)),
            }
        }
    }

    /// Replaces a conversation by its present state.
    ///
    /// # Errors
    /// The filesystem's error. The file is then unchanged.
    pub(crate) fn replace(&self, kept: &mut Kept, conversation: &Conversation) -> Result<(), CliError> {
        let path = self.path(&kept.name)?;
        let written = self.written(conversation)?;
        let file = written.persist(&path).map_err(|e| CliError::file(&path, "write this conversation")(e.error))?;
        kept._file = file;
        Ok(())
    }

    /// Deletes an unnamed conversation, once it has a name.
    pub(crate) fn remove_unnamed(&self, kept: Kept) {
        if kept.name.starts_with(UNNAMED)
            && let Ok(path) = self.path(&kept.name)
        {
            // If this fails, it merely exists twice.
            let _ = fs::remove_file(path);
        }
    }

    /// All conversations, the most recently changed first. Files that cannot be read are left out.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub(crate) fn list(&self) -> Result<Vec<Listed>, CliError> {
        let mut list = Vec::new();
        for name in self.names()? {
            let Ok(mut file) = self.path(&name).map_err(drop).and_then(|path| open_no_link(&path).map_err(drop)) else {
                continue;
            };
            let changed = file.metadata().and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            let Ok(conversation) = read(&mut file) else { continue };
            let first = conversation.turns.first().map(|turn| turn.message.clone()).unwrap_or_default();
            list.push(Listed { name, changed, turns: conversation.turns.len(), first });
        }
        list.sort_by(|a, b| b.changed.cmp(&a.changed).then_with(|| a.name.cmp(&b.name)));
        Ok(list)
    }

    /// The names of all conversations.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub(crate) fn names(&self) -> Result<Vec<String>, CliError> {
        let entries = fs::read_dir(&self.0).map_err(CliError::file(&self.0, "list the conversations"))?;
        let name = |entry: fs::DirEntry| Some(entry.file_name().to_str()?.strip_suffix(".json")?.to_owned());
        let names = entries.filter_map(Result::ok).filter_map(name);
        Ok(names.filter(|name| is_name(name)).collect())
    }

    fn missing(&self, name: &str) -> String {
        let names = self.names().unwrap_or_default();
        let known: Vec<&str> = names.iter().map(String::as_str).collect();
        match crate::chat::nearest(name, &known) {
            Some(near) => format!("there is no conversation `{name}`; is it `{near}`? /load lists all of them"),
            None => format!("there is no conversation `{name}`: /load in a chat lists all of them"),
        }
    }

    fn path(&self, name: &str) -> Result<PathBuf, CliError> {
        if is_name(name) {
            return Ok(self.0.join(format!("{name}.json")));
        }
        Err(CliError::Usage(format!(
            "{name:?} cannot be the name of a conversation: take at most {LONGEST_NAME} letters, digits, `-`, `_` and dots, and begin \
             with a letter or a digit"
        )))
    }

    /// A file with the conversation, locked, without a name yet.
    fn written(&self, conversation: &Conversation) -> Result<tempfile::NamedTempFile, CliError> {
        let write = || {
            let mut file = tempfile::Builder::new().prefix(".").suffix(".partial").tempfile_in(&self.0)?;
            file.write_all(&serde_json::to_vec_pretty(conversation)?)?;
            file.as_file().sync_all()?;
            Ok(file)
        };
        let file = write().map_err(CliError::file(&self.0, "write a conversation here"))?;
        lock(file.as_file(), file.path())?;
        Ok(file)
    }
}

fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.');
    name.chars().next().is_some_and(char::is_alphanumeric)
        && name.chars().all(allowed)
        && name.chars().count() <= LONGEST_NAME
}

fn lock(file: &File, path: &Path) -> Result<(), CliError> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            let path = path.display();
            Err(CliError::Failure(format!("{path}: this conversation is open in another chat: end that one first")))
        }
        // If files cannot be locked, the user must make sure that only one chat has the conversation open.
        Err(TryLockError::Error(_)) => Ok(()),
    }
}

fn read(file: &mut File) -> io::Result<Conversation> {
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut bytes = Vec::new();
    file.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(invalid("it is larger than any conversation".into()));
    }
    let conversation: Conversation =
        serde_json::from_slice(&bytes).map_err(|error| invalid(format!("it is not a conversation: {error}")))?;
    match conversation.version {
        VERSION => Ok(conversation),
        other => Err(invalid(format!("it has version {other}, and this program reads version {VERSION}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conversation(messages: &[&str]) -> Conversation {
        let turn = |message: &&str| Turn {
            message: (*message).to_owned(),
            answer: Some(Said { thinking: "hm".into(), text: format!("to {message}") }),
        };
        let settings = Choices::default();
        let turns = messages.iter().map(turn).collect();
        Conversation { turns, ..Conversation::new("id".into(), Some("Be brief.".into()), settings) }
    }

    fn folder() -> (tempfile::TempDir, Folder) {
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::open(&place.path().join("a/b")).unwrap();
        (place, folder)
    }

    #[test]
    fn what_is_kept_comes_back() {
        let (_place, folder) = folder();
        let (first, second) = (conversation(&["one"]), conversation(&["one", "two"]));
        let mut kept = folder.create(None, &first).unwrap();
        assert_eq!(kept.name, "chat-1");
        folder.replace(&mut kept, &second).unwrap();
        assert!(folder.load("chat-1").unwrap_err().to_string().contains("another chat"), "it is open");
        drop(kept);
        let (loaded, _kept) = folder.load("chat-1").unwrap();
        assert_eq!(loaded, second);
        let roles: Vec<_> = loaded.messages().iter().map(|m| m.fields["role"].as_str().unwrap().to_owned()).collect();
        assert_eq!(roles, ["system", "user", "assistant", "user", "assistant"]);
    }

    #[test]
    fn names_are_not_taken_twice() {
        let (_place, folder) = folder();
        let said = conversation(&["one"]);
        let unnamed = folder.create(None, &said).unwrap();
        assert_eq!(folder.create(None, &said).unwrap().name, "chat-2");
        folder.create(Some("verse"), &said).unwrap();
        assert!(folder.create(Some("verse"), &said).unwrap_err().to_string().contains("already"));
        folder.remove_unnamed(unnamed);
        let names: Vec<_> = folder.list().unwrap().into_iter().map(|listed| (listed.name, listed.first)).collect();
        let of = |name: &str| (name.to_owned(), "one".to_owned());
        assert!(names.contains(&of("verse")) && names.contains(&of("chat-2")) && names.len() == 2, "{names:?}");
        assert!(folder.load("vers").unwrap_err().to_string().contains("is it `verse`?"));
        for wrong in ["", "../verse", ".verse", "a/b", "a b", &"x".repeat(65)] {
            assert!(folder.create(Some(wrong), &said).is_err(), "{wrong}");
        }
    }

    #[test]
    fn other_files_are_refused_by_name() {
        let (place, folder) = folder();
        for (text, word) in [("{", "not a conversation"), (r#"{"version": 1}"#, "not a conversation")] {
            fs::write(place.path().join("a/b/x.json"), text).unwrap();
            let refused = folder.load("x").unwrap_err().to_string();
            assert!(refused.contains("x.json") && refused.contains(word), "{refused}");
        }
        let mut newer = serde_json::to_value(conversation(&[])).unwrap();
        newer["version"] = 2.into();
        fs::write(place.path().join("a/b/x.json"), newer.to_string()).unwrap();
        assert!(folder.load("x").unwrap_err().to_string().contains("version 2"));
        assert!(folder.list().unwrap().is_empty());
    }
}
