//! Codec 1: the bytes of numbers, separated into planes by their place in the number; each plane is compressed if it gets
//! shorter.
//!
//! `docs/FORMAT.md` describes the stored bytes. They are cut into frames that are decoded independently, so several threads can
//! share an extent. This code does not trust them: [`Frames::read`] checks every length before anything is decoded, and
//! allocates only a record per frame.

use std::cell::RefCell;
use std::ops::Range;

use sluice_weights::{BLOCK, WeightType};

use crate::bytes::{get_u32, get_u64, put, round_up};
use crate::extent::ExtentKind;
use crate::fields::{planes_frame, planes_head, reserved_in_use};
use crate::limits::MAX_FRAME_BYTES;
use crate::tensor::TensorRecord;
use crate::zstandard::{PlaneCoder, decompress};

/// Most planes of a frame.
const WIDEST: usize = 4;
/// Logical bytes of the frames that this program makes. A frame's planes and its decoded bytes fit in a core's own
/// cache.
const FRAME_BYTES: usize = 256 << 10;
/// A plane that compression shortens by less than one part in this many is left as it is: decoding it would cost more
/// than reading it.
const PLANE_GAIN: usize = 32;
/// An extent is compressed only if that saves this much of what a read moves, in percent.
pub const LEAST_GAIN: u64 = 8;

thread_local! {
    /// Decoded planes of one frame. At most [`MAX_FRAME_BYTES`].
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// One frame: its decoded bytes, and where its planes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// First logical byte.
    start: usize,
    /// Logical bytes.
    len: usize,
    width: usize,
    /// First stored byte of the first plane; the others follow.
    place: usize,
    planes: [u32; WIDEST],
}

impl Frame {
    /// The logical bytes to which it decodes.
    pub fn range(&self) -> Range<usize> {
        self.start..self.start + self.len
    }

    /// Decodes it. `stored` are the stored bytes of the extent, as [`Frames::read`] got them; `out` is [`Frame::range`] of the
    /// decoded extent.
    ///
    /// # Errors
    /// What is wrong with a plane.
    ///
    /// # Panics
    /// If `out` has another length than the range, or `stored` are other bytes than were read.
    pub fn decode(&self, stored: &[u8], out: &mut [u8]) -> Result<(), String> {
        assert_eq!(out.len(), self.len, "the range of the frame");
        let plane_len = self.len / self.width;
        if self.width == 1 {
            return decode_plane(&stored[self.place..][..self.planes[0] as usize], out);
        }
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize(scratch.len().max(MAX_FRAME_BYTES), 0);
            let mut place = self.place;
            let mut free = &mut scratch[..];
            let mut planes: [&[u8]; WIDEST] = [&[]; WIDEST];
            for (plane, &len) in planes.iter_mut().zip(&self.planes[..self.width]) {
                let bytes = &stored[place..][..len as usize];
                place += len as usize;
                *plane = if bytes.len() == plane_len {
                    bytes
                } else {
                    let (decoded, rest) = std::mem::take(&mut free).split_at_mut(plane_len);
                    decompress(bytes, decoded)?;
                    free = rest;
                    decoded
                };
            }
            merge(planes, self.width, out);
            Ok(())
        })
    }
}

fn decode_plane(bytes: &[u8], out: &mut [u8]) -> Result<(), String> {
    if bytes.len() == out.len() {
        out.copy_from_slice(bytes);
        return Ok(());
    }
    decompress(bytes, out)
}

/// Joins the planes into numbers again.
fn merge(planes: [&[u8]; WIDEST], width: usize, out: &mut [u8]) {
    let [a, b, c, d] = planes;
    match width {
        2 => out.as_chunks_mut::<2>().0.iter_mut().zip(a.iter().zip(b)).for_each(|(out, (a, b))| *out = [*a, *b]),
        _ => {
            let planes = a.iter().zip(b).zip(c.iter().zip(d));
            let numbers = out.as_chunks_mut::<4>().0.iter_mut().zip(planes);
            numbers.for_each(|(out, ((a, b), (c, d)))| *out = [*a, *b, *c, *d]);
        }
    }
}

/// The frames of a compressed extent.
#[derive(Debug, Default)]
pub struct Frames {
    frames: Vec<Frame>,
}

impl Frames {
    /// Makes room for this many frames, so that reading as many allocates nothing.
    pub fn with_capacity(frames: usize) -> Self {
        Frames { frames: Vec::with_capacity(frames) }
    }

    /// Reads head and records of an extent's stored bytes, which decode to `logical_len` bytes. They replace the frames that
    /// were read before.
    ///
    /// # Errors
    /// The rule that they break.
    pub fn read(&mut self, stored: &[u8], logical_len: u64) -> Result<&[Frame], String> {
        self.frames.clear();
        let head = stored.get(..planes_head::LEN).ok_or("it has no head")?;
        let count = get_u32(head, planes_head::FRAMES) as usize;
        let coded_len = usize::try_from(get_u64(head, planes_head::CODED_LEN)).ok();
        let coded_len = coded_len.filter(|&len| len <= stored.len()).ok_or("it is longer than its extent")?;
        let records = count.checked_mul(planes_frame::LEN).and_then(|len| stored.get(planes_head::LEN..)?.get(..len));
        let records = records.ok_or("its records run past its end")?;
        if reserved_in_use(&planes_head::FIELDS, head) || stored[coded_len..].iter().any(|&byte| byte != 0) {
            return Err("its reserved bytes or its padding are in use".into());
        }
        let (mut start, mut place) = (0usize, planes_head::LEN + records.len());
        self.frames.try_reserve(count).map_err(|_| "there is no memory for its records")?;
        for (number, record) in records.chunks_exact(planes_frame::LEN).enumerate() {
            let frame = Frame::parse(record, start, place).map_err(|problem| format!("frame {number}: {problem}"))?;
            start += frame.len;
            // Cannot overflow: a plane is no longer than its decoded bytes, and these have a limit.
            place += frame.planes.iter().map(|&len| len as usize).sum::<usize>();
            if start as u64 > logical_len || place > coded_len {
                return Err(format!("frame {number}: it runs past the end"));
            }
            self.frames.push(frame);
        }
        if start as u64 != logical_len || place != coded_len {
            return Err(format!(
                "its frames end at {start} of {logical_len} bytes, its planes at {place} of {coded_len}"
            ));
        }
        Ok(&self.frames)
    }

    /// The frames that were read last.
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }
}

impl Frame {
    fn parse(record: &[u8], start: usize, place: usize) -> Result<Frame, String> {
        if reserved_in_use(&planes_frame::FIELDS, record) {
            return Err("its reserved bytes are in use".into());
        }
        let len = get_u32(record, planes_frame::BYTES) as usize;
        let width = usize::from(record[planes_frame::WIDTH]);
        if !matches!(width, 1 | 2 | WIDEST) {
            return Err(format!("its width is {width}"));
        }
        if len == 0 || len > MAX_FRAME_BYTES || !len.is_multiple_of(width) {
            return Err(format!("it has {len} bytes, in values of {width}"));
        }
        let planes: [u32; WIDEST] = std::array::from_fn(|plane| get_u32(record, planes_frame::PLANES + 4 * plane));
        let most = (len / width) as u32;
        let (used, others) = planes.split_at(width);
        if used.iter().any(|stored| !(1..=most).contains(stored)) || others.iter().any(|&stored| stored != 0) {
            return Err(format!("its planes have {planes:?} bytes"));
        }
        Ok(Frame { start, len, width, place, planes })
    }
}

/// Decodes all of a compressed extent into `out`: the logical bytes, then zeros.
///
/// # Errors
/// What is wrong with it.
pub fn decode(stored: &[u8], logical_len: u64, out: &mut [u8]) -> Result<(), String> {
    let mut frames = Frames::default();
    let logical = usize::try_from(logical_len).ok().filter(|&len| len <= out.len()).ok_or("it is too long")?;
    for frame in frames.read(stored, logical_len)? {
        frame.decode(stored, &mut out[frame.range()])?;
    }
    out[logical..].fill(0);
    Ok(())
}

/// How the numbers of a type are separated; `None` for a type that does not get shorter.
fn width_of(ty: WeightType) -> Option<usize> {
    match ty {
        WeightType::F32 => Some(4),
        WeightType::F16 | WeightType::Bf16 => Some(2),
        WeightType::Fp8 | WeightType::Q8 => Some(1),
        // Codes of eight bits.
        WeightType::Grouped(grouped) if grouped.codes().block_len() == BLOCK => Some(1),
        _ => None,
    }
}

/// Whether compression may shorten an extent of these tensors at all. Tables are not compressed: their rows are read one by one.
pub fn may_gain(tensors: &[TensorRecord]) -> bool {
    tensors.iter().any(|tensor| tensor.kind != ExtentKind::Table && width_of(tensor.weight_type).is_some())
}

/// The stored bytes, in whole pages, of an extent with these logical bytes and tensors; `None` if that saves less than
/// [`LEAST_GAIN`]. Equal input gives equal output.
pub fn encode(logical: &[u8], tensors: &[TensorRecord], page_size: u32) -> Option<Vec<u8>> {
    let page = u64::from(page_size);
    let raw = round_up(logical.len().max(1) as u64, page)?;
    let most = usize::try_from(raw - (raw * LEAST_GAIN).div_ceil(100)).ok()?;
    if !may_gain(tensors) {
        return None;
    }
    let parts = cut(logical.len(), tensors);
    let mut out = vec![0; planes_head::LEN + parts.len() * planes_frame::LEN];
    let mut coder = PlaneCoder::new();
    let (mut plane, mut coded) = (Vec::new(), Vec::new());
    for (number, (range, width)) in parts.iter().enumerate() {
        let record = planes_head::LEN + number * planes_frame::LEN;
        let bytes = &logical[range.clone()];
        put(&mut out, record + planes_frame::BYTES, &(bytes.len() as u32).to_le_bytes());
        put(&mut out, record + planes_frame::WIDTH, &[width.unwrap_or(1) as u8]);
        for number in 0..width.unwrap_or(1) {
            plane.clear();
            plane.extend(bytes.iter().skip(number).step_by(width.unwrap_or(1)));
            let short = width.is_some()
                && coder.compress(&plane, &mut coded)
                && coded.len() + plane.len() / PLANE_GAIN < plane.len();
            let stored = if short { &coded } else { &plane };
            put(&mut out, record + planes_frame::PLANES + 4 * number, &(stored.len() as u32).to_le_bytes());
            out.extend(stored);
        }
        // The subtraction must not go below zero.
        if out.len() > most {
            return None;
        }
    }
    let coded_len = out.len() as u64;
    put(&mut out, planes_head::FRAMES, &(parts.len() as u32).to_le_bytes());
    put(&mut out, planes_head::CODED_LEN, &coded_len.to_le_bytes());
    out.resize(usize::try_from(round_up(coded_len, page)?).ok()?, 0);
    (out.len() <= most).then_some(out)
}

/// The frames of an extent, each with the width of its numbers, if separating them may help: every tensor with the gap behind it,
/// in pieces.
fn cut(len: usize, tensors: &[TensorRecord]) -> Vec<(Range<usize>, Option<usize>)> {
    let mut parts = Vec::new();
    let starts: Vec<usize> = tensors.iter().map(|tensor| (tensor.offset as usize).min(len)).collect();
    for (i, tensor) in tensors.iter().enumerate() {
        let end = starts.get(i + 1).copied().unwrap_or(len);
        for start in (starts[i]..end).step_by(FRAME_BYTES) {
            let range = start..(start + FRAME_BYTES).min(end);
            // Tensors begin at multiples of 64, so only the last can end within a number, and only if its type allows that.
            let width = width_of(tensor.weight_type).filter(|&width| range.len().is_multiple_of(width));
            parts.push((range, width));
        }
    }
    parts
}
