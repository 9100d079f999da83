//! How the file of an opened model is read.

use sluice_storage::io::{IoConfig, LaneInfo, Tuning};

use super::Engine;

impl Engine {
    /// How the file is read, in words: engine, direct or buffered, and why; for each drive if the file's parts lie on several.
    pub fn read_path(&self) -> String {
        let lanes = self.storage.io.lanes();
        let several = lanes.len() > 1;
        let in_words = lanes.enumerate().map(|(number, LaneInfo { engine, files, config })| {
            let direct = files.iter().map(|&file| self.storage.direct[usize::from(file)].to_string());
            let path = format!("{} ({}), {}", engine.name, engine.note, direct.collect::<Vec<_>>().join("; "));
            if several {
                let IoConfig { depth, chunk_bytes, .. } = config;
                format!("drive {}: {depth} chunks of {} KiB by {path}", number + 1, chunk_bytes >> 10)
            } else {
                path
            }
        });
        in_words.collect::<Vec<_>>().join("; ")
    }

    /// Short name of the engine that reads the file; for its first part, if it lies on several drives.
    pub fn read_engine(&self) -> &'static str {
        self.storage.io.engine().name
    }

    /// How the file is to be read, and the source of these settings; for its first part, if it lies on several drives.
    pub fn tuning(&self) -> &Tuning {
        &self.tuning[0]
    }

    /// Chunks and depth of the reads; for the first part of the file, if it lies on several drives.
    pub fn io_config(&self) -> &IoConfig {
        &self.tuning().config
    }

    /// Chunks that may be in flight now: the depth of [`Engine::io_config`], or, where nothing was known about the drive, what its own
    /// reads have shown to be enough; for the first part of the file, if it lies on several drives.
    pub fn depth(&self) -> usize {
        self.storage.io.depth()
    }
}
