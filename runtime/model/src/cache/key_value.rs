//! Keys and values of grouped-query attention.

use std::ops::Range;

use sluice_format::GqaSpec;
use sluice_kernels::{KvBuffer, KvRows, KvType};

/// Keys and values of one layer and one sequence: `[kv_heads, max_tokens, width]` each, so that a head's are contiguous.
#[derive(Debug)]
pub struct KeyValueCache {
    keys: KvBuffer,
    values: KvBuffer,
    kv_heads: usize,
    window: Option<usize>,
    /// The first position that has a row: a restored sequence has those in the window alone.
    first: usize,
    max_tokens: usize,
}

impl KeyValueCache {
    /// An empty cache for `max_tokens` positions.
    pub fn new(spec: &GqaSpec, max_tokens: usize, ty: KvType) -> Self {
        KeyValueCache {
            keys: KvBuffer::new(ty, spec.kv_heads * max_tokens, spec.head_dim),
            values: KvBuffer::new(ty, spec.kv_heads * max_tokens, spec.v_head_dim),
            kv_heads: spec.kv_heads,
            window: spec.window,
            first: 0,
            max_tokens,
        }
    }

    /// Keys and values of a head at `positions`, oldest first. This is the one place that knows where rows lie: ask for
    /// those of one block of keys at a time.
    ///
    /// # Panics
    /// If there are fewer positions or heads.
    pub fn rows(&self, head: usize, positions: Range<usize>) -> (KvRows<'_>, KvRows<'_>) {
        let rows = self.row(head, positions.start)..self.row(head, positions.end);
        (self.keys.rows(rows.clone()), self.values.rows(rows))
    }

    /// Puts the keys `[kv_heads, head_dim]` and values `[kv_heads, v_head_dim]` of a position in.
    pub fn set(&mut self, position: usize, keys: &[f32], values: &[f32]) {
        let (key_width, value_width) = (keys.len() / self.kv_heads, values.len() / self.kv_heads);
        let rows = keys.chunks_exact(key_width).zip(values.chunks_exact(value_width));
        for (head, (key, value)) in rows.enumerate() {
            let row = self.row(head, position);
            self.keys.set(row, key);
            self.values.set(row, value);
        }
    }

    /// Where the row of a head and position is.
    fn row(&self, head: usize, position: usize) -> usize {
        head * self.max_tokens + position
    }

    /// Bytes that are allocated.
    pub fn bytes(&self) -> usize {
        self.keys.bytes() + self.values.bytes()
    }

    /// A copy that has the rows before `position`.
    pub fn fork(&self, position: usize) -> Self {
        let (mut keys, mut values) = (self.keys.empty_like(), self.values.empty_like());
        for head in 0..self.kv_heads {
            let rows = head * self.max_tokens + self.first..head * self.max_tokens + position.max(self.first);
            keys.copy_rows(&self.keys, rows.clone());
            values.copy_rows(&self.values, rows);
        }
        KeyValueCache { keys, values, ..*self }
    }

    /// Rows before `position` that the token there and later ones can see.
    pub fn seen_from(&self, position: usize) -> Range<usize> {
        // A token sees itself, and so one earlier row less than the window has.
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))..position
    }

    /// Whether everything is there that tokens from `position` on see.
    pub fn reaches(&self, position: usize) -> bool {
        position == 0 || self.seen_from(position).start >= self.first
    }

    /// Rows from `position` on no longer count.
    pub fn rewind(&mut self, position: usize) {
        if position == 0 {
            self.first = 0;
        }
    }

    /// The first position that has a row is now `position`.
    pub fn begin_at(&mut self, position: usize) {
        self.first = position;
    }

    /// Bytes of one position: each head's key, then each head's value.
    pub fn row_len(&self) -> usize {
        self.kv_heads * (self.keys.row_len() + self.values.row_len())
    }

    /// Writes the rows of a position.
    pub fn row_to_bytes(&self, position: usize, out: &mut [u8]) {
        let (keys, values) = out.split_at_mut(self.kv_heads * self.keys.row_len());
        for (buffer, out) in [(&self.keys, keys), (&self.values, values)] {
            for (head, out) in out.chunks_exact_mut(buffer.row_len()).enumerate() {
                buffer.row_to_bytes(head * self.max_tokens + position, out);
            }
        }
    }

    /// Puts the rows of a position back.
    pub fn row_from_bytes(&mut self, position: usize, bytes: &[u8]) {
        let (keys, values) = bytes.split_at(self.kv_heads * self.keys.row_len());
        for (buffer, bytes) in [(&mut self.keys, keys), (&mut self.values, values)] {
            for (head, bytes) in bytes.chunks_exact(buffer.row_len()).enumerate() {
                buffer.row_from_bytes(head * self.max_tokens + position, bytes);
            }
        }
    }
}

/// Bytes that the cache holds per token.
pub fn bytes_per_token(spec: &GqaSpec, ty: KvType) -> usize {
    spec.kv_heads * (KvBuffer::row_bytes(ty, spec.head_dim) + KvBuffer::row_bytes(ty, spec.v_head_dim))
}
