//! Large objects go in pieces, several at a time, and without a copy of all of them.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStoreExt, PutPayload};

use super::Store;
use super::direct::{self, Unwritten};
use crate::traffic::Operation;

/// Bytes that one request for a part of a large object carries. Larger objects are read and written in pieces of it, so
/// that a stall or a lost connection costs one piece.
pub(super) const PIECE: usize = 8 << 20;
/// Pieces under way at a time: at most 64 MiB of one object are on the wire.
pub(super) const PIECES: usize = 8;
/// Larger objects than this are written in pieces.
const WHOLE_MAX: usize = 2 * PIECE;
/// Names the error of bytes that came short, among those of stores.
pub(super) const SHORT: &str = "anello";
/// Names the error of an object that is not there as it was written.
pub(super) const UNPROVED: &str = "anello, read back";

impl Store {
    /// Writes `chunks`, one after the other, as one object.
    pub fn put_chunks(&self, path: &str, chunks: &[Bytes]) -> crate::Result<()> {
        self.meter.written(chunks.iter().map(Bytes::len).sum());
        let at = self.at(path);
        let written = self.patiently(Operation::Put, || self.runtime.block_on(self.write(&at, chunks)));
        written.map_err(|e| self.failed("writing", path, e))
    }

    /// [`Store::put_chunks`], and reads the object back, a few pieces at a time, and compares: an error where it is not
    /// there as it was written. `see` gets the place of each chunk in turn, as late as possible before it is written.
    pub fn put_proved(&self, path: &str, chunks: &[Bytes], see: impl FnMut(usize)) -> crate::Result<()> {
        let length = chunks.iter().map(Bytes::len).sum::<usize>();
        if let Some(files) = self.files.as_ref().filter(|_| self.durable && length >= PIECE) {
            let failed = |action, cause| self.failed(action, path, cause);
            let file = files.path_to_filesystem(&self.at(path)).map_err(|e| failed("writing", e))?;
            self.meter.written(length);
            self.runtime.block_on(async { tokio::join!(self.may_write(length), self.may_read(length)) });
            let (written, proved) = match direct::write(&file, chunks, see) {
                Ok(()) => (Ok(()), Ok(())),
                Err(Unwritten::Writing(cause)) => (Err(of_file(cause)), Ok(())),
                Err(Unwritten::Reading(cause)) => (Ok(()), Err(of_file(cause))),
                Err(Unwritten::Differs(bytes)) => (Ok(()), Err(differs(&bytes))),
            };
            self.meter.count(Operation::Put, written).map_err(|e| failed("writing", e))?;
            self.meter.read(length);
            return self.meter.count(Operation::Get, proved).map_err(|e| failed("reading back", e));
        }
        (0..chunks.len()).for_each(see);
        self.put_chunks(path, chunks)?;
        let at = self.at(path);
        // A store may take a while to show what it has taken.
        let prove = || self.runtime.block_on(self.prove(&at, chunks));
        let proved = self.while_wrong(Operation::Get, |_| true, prove);
        proved.map_err(|e| self.failed("reading back", path, e))?;
        self.meter.read(length);
        Ok(())
    }

    pub(super) async fn may_read(&self, bytes: usize) {
        if let Some(limits) = &self.limits {
            limits.read.wait(bytes).await;
        }
    }

    async fn may_write(&self, bytes: usize) {
        if let Some(limits) = &self.limits {
            limits.write.wait(bytes).await;
        }
    }

    /// All of an object, when its size `fits`, else its size; a large one of a remote store in pieces, all of one version.
    pub(super) async fn read(
        &self,
        at: &Path,
        fits: &impl Fn(u64) -> bool,
    ) -> object_store::Result<Result<Bytes, u64>> {
        let found = self.inner.get(at).await?;
        let (size, version) = (found.meta.size, found.meta.e_tag.clone());
        if !fits(size) {
            return Ok(Err(size));
        }
        if self.folder.is_some() || size <= WHOLE_MAX as u64 || version.is_none() {
            self.may_read(size as usize).await;
            return whole(found.bytes().await?, size).map(Ok);
        }
        drop(found);
        let starts = (0..size).step_by(PIECE);
        let pieces = starts.map(|start| {
            let range = start..size.min(start + PIECE as u64);
            let length = range.end - range.start;
            let range = Some(GetRange::Bounded(range));
            let options = GetOptions { range, if_match: version.clone(), ..Default::default() };
            async move {
                self.may_read(length as usize).await;
                whole(self.inner.get_opts(at, options).await?.bytes().await?, length)
            }
        });
        let mut all = BytesMut::with_capacity(size as usize);
        let mut pieces = stream::iter(pieces).buffered(PIECES);
        while let Some(piece) = pieces.try_next().await? {
            all.extend_from_slice(&piece);
        }
        Ok(Ok(all.freeze()))
    }

    /// Writes the chunks as one object; a large one of a remote store appears with its last piece, whole.
    pub(super) async fn write(&self, at: &Path, chunks: &[Bytes]) -> object_store::Result<()> {
        let length: usize = chunks.iter().map(Bytes::len).sum();
        if self.folder.is_some() || length <= WHOLE_MAX {
            self.may_write(length).await;
            return self.inner.put(at, chunks.iter().cloned().collect()).await.map(drop);
        }
        let mut upload = self.inner.put_multipart(at).await?;
        let send = |piece: PutPayload| {
            let (length, sent) = (piece.content_length(), upload.put_part(piece));
            async move {
                self.may_write(length).await;
                sent.await
            }
        };
        let pieces: Vec<_> = cut(chunks).into_iter().map(send).collect();
        let sent = stream::iter(pieces).buffer_unordered(PIECES).try_collect::<Vec<()>>().await;
        let done = match sent {
            Ok(_) => upload.complete().await.map(drop),
            Err(cause) => Err(cause),
        };
        if done.is_err() {
            // What was sent costs until the bucket's own rules remove it; that it cannot be removed now is no news.
            let _ = upload.abort().await;
        }
        done
    }

    /// An error unless the object is there and is the chunks, one after the other.
    pub(super) async fn prove(&self, at: &Path, chunks: &[Bytes]) -> object_store::Result<()> {
        let length = chunks.iter().map(|chunk| chunk.len() as u64).sum::<u64>();
        let size = self.inner.head(at).await?.size;
        if size != length {
            return Err(unproved(format!("it has {size} bytes of {length} that were written")));
        }
        let starts = (0..length).step_by(PIECE);
        let pieces = cut(chunks).into_iter().zip(starts).map(|(written, start)| async move {
            let range = start..start + written.content_length() as u64;
            self.may_read(written.content_length()).await;
            let read = whole(self.inner.get_range(at, range.clone()).await?, range.end - range.start)?;
            let same = are(&read, written.as_ref());
            same.then_some(()).ok_or_else(|| differs(&range))
        });
        let at_a_time = if self.folder.is_some() { 1 } else { PIECES };
        stream::iter(pieces).buffer_unordered(at_a_time).try_collect().await
    }
}

pub(super) fn of_file(source: std::io::Error) -> object_store::Error {
    object_store::Error::Generic { store: "LocalFileSystem", source: Box::new(source) }
}

fn differs(range: &Range<u64>) -> object_store::Error {
    unproved(format!("bytes {range:?} are not those that were written"))
}

fn unproved(fact: String) -> object_store::Error {
    object_store::Error::Generic { store: UNPROVED, source: fact.into() }
}

/// The chunks, cut into pieces of [`PIECE`] bytes and a last one of the rest.
fn cut(chunks: &[Bytes]) -> Vec<PutPayload> {
    let (mut pieces, mut piece, mut room) = (Vec::new(), Vec::new(), PIECE);
    for chunk in chunks {
        let mut rest = chunk.clone();
        while !rest.is_empty() {
            let some = rest.split_to(room.min(rest.len()));
            room -= some.len();
            piece.push(some);
            if room == 0 {
                pieces.push(std::mem::take(&mut piece).into_iter().collect());
                room = PIECE;
            }
        }
    }
    if !piece.is_empty() {
        pieces.push(piece.into_iter().collect());
    }
    pieces
}

/// Whether `bytes` are the chunks, one after the other.
fn are(bytes: &[u8], chunks: &[Bytes]) -> bool {
    let mut rest = bytes;
    chunks.iter().all(|chunk| match rest.split_at_checked(chunk.len()) {
        Some((first, after)) if first == chunk => {
            rest = after;
            true
        }
        _ => false,
    }) && rest.is_empty()
}

/// The bytes, when they are as many as were asked for.
pub(super) fn whole(bytes: Bytes, length: u64) -> object_store::Result<Bytes> {
    if bytes.len() as u64 == length {
        return Ok(bytes);
    }
    let fact = format!("{} bytes came of {length}", bytes.len());
    Err(object_store::Error::Generic { store: SHORT, source: fact.into() })
}
