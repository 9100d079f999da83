//! Zstandard frames (RFC 8878) whose length before compression is known from elsewhere, so the frame's own statement never
//! decides an allocation.

use std::cell::RefCell;

use zstd::zstd_safe::{CCtx, CParameter, DCtx, ParamSwitch, compress_bound, get_error_name};

/// Level for metadata: text, compressed once and read at every opening.
const METADATA_LEVEL: i32 = 12;
/// Level for planes. The fastest levels do not search for matches and leave an entropy code of single bytes, which is all that
/// compresses weights. The result decodes twice as fast as that of the usual levels, and is shorter: matches of three or four bytes
/// occur only by chance, and cost more than they save.
const PLANE_LEVEL: i32 = -20;
/// Shortest match; for the same reason, the largest value that can be set.
const PLANE_MATCH: u32 = 7;

thread_local! {
    static DECODER: RefCell<Option<DCtx<'static>>> = const { RefCell::new(None) };
}

/// Compresses bytes of planes, one piece after the other.
pub(crate) struct PlaneCoder(CCtx<'static>);

impl PlaneCoder {
    pub(crate) fn new() -> Self {
        let mut context = CCtx::create();
        let parameters = [
            CParameter::CompressionLevel(PLANE_LEVEL),
            CParameter::MinMatch(PLANE_MATCH),
            CParameter::LiteralCompressionMode(ParamSwitch::Enable),
        ];
        for parameter in parameters {
            // A library that does not know one of these settings compresses less.
            let _ = context.set_parameter(parameter);
        }
        PlaneCoder(context)
    }

    /// Replaces `out` by one frame of `bytes`; false if that fails.
    pub(crate) fn compress(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> bool {
        out.clear();
        out.reserve(compress_bound(bytes.len()));
        self.0.compress2(out, bytes).is_ok()
    }
}

/// One frame of `bytes`, which compresses text well.
///
/// # Errors
/// The library's error; it fails only if memory is short.
pub(crate) fn compress_text(bytes: &[u8]) -> Result<Vec<u8>, &'static str> {
    let mut out = Vec::with_capacity(compress_bound(bytes.len()));
    CCtx::create().compress(&mut out, bytes, METADATA_LEVEL).map_err(get_error_name)?;
    Ok(out)
}

/// Decodes frames that give exactly `out`.
///
/// # Errors
/// What is wrong with them.
pub(crate) fn decompress(frame: &[u8], out: &mut [u8]) -> Result<(), String> {
    DECODER.with_borrow_mut(|decoder| {
        let len = decoder.get_or_insert_with(DCtx::create).decompress(out, frame).map_err(get_error_name)?;
        if len == out.len() { Ok(()) } else { Err(format!("it decodes to {len} bytes, not {}", out.len())) }
    })
}
