//! Files in a folder, or with several names, as the source of a checkpoint.

use std::io::Read;
use std::path::{Path, PathBuf};

use sluice_format::open_regular;

use super::local::LocalFile;
use super::locate::{self, Located};
use super::recognise::Foreign;
use super::{Checkpoint, FileUse, MAX_SIDE_FILE, Source, SourceFile, Stamp, header};
use crate::error::ConvertError;

/// Opens the safetensors checkpoint in `dir`. As in transformers and vLLM, all tensors in the files are used, even those that the
/// index does not name.
pub(super) fn open(dir: &Path) -> Result<Checkpoint, ConvertError> {
    let located = locate::locate(dir)?;
    let source = Folder::open(dir, &located)?;
    Checkpoint::of_safetensors(Box::new(source), located)
}

/// Open files, and the folder with the small files beside them.
#[derive(Debug)]
pub(crate) struct Folder {
    dir: PathBuf,
    files: Vec<SourceFile>,
    /// The same files, open.
    open: Vec<LocalFile>,
}

impl Folder {
    /// Opens the files of a checkpoint.
    fn open(dir: &Path, located: &Located) -> Result<Self, ConvertError> {
        let mut folder = Folder { dir: dir.to_owned(), files: Vec::new(), open: Vec::new() };
        for name in &located.files {
            folder.add(name, &dir.join(name))?;
        }
        Ok(folder)
    }

    /// Opens these files; `path` is the user's.
    pub(super) fn of_files(path: &Path, files: &[PathBuf]) -> Result<Self, ConvertError> {
        let mut folder = Folder { dir: path.to_owned(), files: Vec::new(), open: Vec::new() };
        for file in files {
            let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy();
            folder.add(&name, file)?;
        }
        Ok(folder)
    }

    /// Opens one more file.
    fn add(&mut self, name: &str, path: &Path) -> Result<(), ConvertError> {
        let (file, stamp, len) = LocalFile::open(path)?;
        self.files.push(SourceFile { name: name.to_owned(), path: path.to_owned(), len, stamp });
        self.open.push(file);
        Ok(())
    }
}

impl Source for Folder {
    fn path(&self) -> &Path {
        &self.dir
    }

    fn files(&self) -> &[SourceFile] {
        &self.files
    }

    fn read_at(&self, file: usize, at: u64, out: &mut [u8]) -> Result<(), ConvertError> {
        self.open[file].read_at(&self.files[file].path, at, out)
    }

    fn check_unchanged(&self) -> Result<(), ConvertError> {
        for (file, opened) in self.files.iter().zip(&self.open) {
            let now = opened.stamp().map_err(ConvertError::io(&file.path, "read its state"))?;
            if now != file.stamp {
                return Err(ConvertError::SourceChanged { path: file.path.clone() });
            }
        }
        Ok(())
    }

    fn text_file(&self, name: &str) -> Result<Option<Vec<u8>>, ConvertError> {
        side_file(&self.dir, name)
    }

    fn is_fetched(&self) -> bool {
        false
    }

    fn schedule(&self, _uses: &[FileUse]) {}

    fn release(&self, _file: usize) {}

    fn folder(&self) -> Option<&Path> {
        Some(&self.dir)
    }
}

/// Opens a safetensors file; returns it with its identity, its length and its header, length field included.
pub(crate) fn open_safetensors(path: &Path) -> Result<(LocalFile, Stamp, u64, Vec<u8>), ConvertError> {
    let (file, stamp, len) = LocalFile::open(path)?;
    let header = read_header(path, len, &|at, out| file.read_at(path, at, out))?;
    Ok((file, stamp, len, header))
}

/// Reads bytes of a file from an offset on.
pub(super) type ReadAt<'a> = &'a dyn Fn(u64, &mut [u8]) -> Result<(), ConvertError>;

/// The header of a safetensors file of `len` bytes, length field included.
pub(super) fn read_header(path: &Path, len: u64, read: ReadAt<'_>) -> Result<Vec<u8>, ConvertError> {
    let damaged = |problem: String| ConvertError::Damaged { path: path.to_owned(), problem };
    if len < header::LENGTH_FIELD {
        return Err(damaged(format!("it has only {len} bytes")));
    }
    let mut head = vec![0; len.min(64) as usize];
    read(0, &mut head)?;
    if let Some(foreign) = Foreign::of_bytes(&head) {
        return Err(foreign.error(path));
    }
    let (field, _) = head.split_first_chunk().ok_or_else(|| damaged(format!("it has only {len} bytes")))?;
    let header_len = header::header_len(*field, len).map_err(damaged)?;
    let mut header = vec![0; (header::LENGTH_FIELD + header_len) as usize];
    read(0, &mut header)?;
    Ok(header)
}

/// Reads a small file of a checkpoint's folder, or returns `None` if it does not exist.
pub(crate) fn side_file(dir: &Path, name: &str) -> Result<Option<Vec<u8>>, ConvertError> {
    let path = dir.join(name);
    if path.exists() { read_side_file(&path).map(Some) } else { Ok(None) }
}

/// Reads a whole small file.
pub(crate) fn read_side_file(path: &Path) -> Result<Vec<u8>, ConvertError> {
    let file = open_regular(path).map_err(ConvertError::io(path, "open it"))?;
    let mut bytes = Vec::new();
    // The limit applies to what is read, not to the length from the filesystem: files in /proc have no length.
    file.take(MAX_SIDE_FILE + 1).read_to_end(&mut bytes).map_err(ConvertError::io(path, "read it"))?;
    if bytes.len() as u64 > MAX_SIDE_FILE {
        let problem = format!("it has more than {MAX_SIDE_FILE} bytes");
        return Err(ConvertError::Damaged { path: path.to_owned(), problem });
    }
    match Foreign::of_bytes(&bytes) {
        Some(foreign) => Err(foreign.error(path)),
        None => Ok(bytes),
    }
}
