//! A source whose small files are made from metadata.

use std::path::{Path, PathBuf};

use crate::error::ConvertError;
use crate::source::{FileUse, Source, SourceFile};

/// Another source, and small files that replace its own.
#[derive(Debug)]
pub(super) struct WithTexts {
    inner: Box<dyn Source>,
    texts: Vec<(String, Vec<u8>)>,
}

impl WithTexts {
    pub(super) fn new(inner: Box<dyn Source>, texts: Vec<(String, Vec<u8>)>) -> Self {
        WithTexts { inner, texts }
    }
}

impl Source for WithTexts {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn files(&self) -> &[SourceFile] {
        self.inner.files()
    }

    fn read_at(&self, file: usize, at: u64, out: &mut [u8]) -> Result<(), ConvertError> {
        self.inner.read_at(file, at, out)
    }

    fn check_unchanged(&self) -> Result<(), ConvertError> {
        self.inner.check_unchanged()
    }

    fn text_file(&self, name: &str) -> Result<Option<Vec<u8>>, ConvertError> {
        Ok(self.texts.iter().find(|(text, _)| text == name).map(|(_, bytes)| bytes.clone()))
    }

    fn text_path(&self, name: &str) -> PathBuf {
        format!("{} (`{name}` as its keys give it)", self.path().display()).into()
    }

    fn is_fetched(&self) -> bool {
        self.inner.is_fetched()
    }

    fn schedule(&self, uses: &[FileUse]) {
        self.inner.schedule(uses);
    }

    fn release(&self, file: usize) {
        self.inner.release(file);
    }

    fn is_content_addressed(&self) -> bool {
        self.inner.is_content_addressed()
    }

    fn folder(&self) -> Option<&Path> {
        // The named path is a file.
        self.inner.folder().and_then(Path::parent)
    }
}
