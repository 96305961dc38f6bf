//! Large files of a folder, past the kernel's page cache where the file system allows it (`O_DIRECT`).
//!
//! By way of the page cache a checkpoint comes to the disk as fast as the kernel writes back, which on a busy machine was a sixth of
//! what the disk takes (docs/measured.md), it drives out what others read again, and what is read back is the cache and not the disk. Where
//! a file system does not allow it (some do not, some only for other sizes), the same calls go through the cache.
//!
//! Nothing here needs unsafe code: memory that lies as the disk wants it is cut out of a larger vector.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// What places, sizes and memory are multiples of: the largest block that disks in use have.
const ALIGNMENT: usize = 4096;
/// Bytes of one write, and the most of one read.
const PIECE: usize = 4 << 20;
/// With room for what stands before and after what is asked for.
const STAGED: usize = PIECE + 2 * ALIGNMENT;

/// Memory that a disk can be asked to fill.
struct Staging {
    memory: Vec<u8>,
    start: usize,
}

impl Staging {
    fn new() -> Self {
        let memory = vec![0; STAGED + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Self { memory, start }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + STAGED]
    }
}

fn up(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGNMENT as u64)
}

/// Opens past the cache, or through it where that is not possible.
fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    match options.custom_flags(OFlags::DIRECT.bits() as i32).open(path) {
        Err(cause) if cause.kind() == ErrorKind::InvalidInput => options.custom_flags(0).open(path),
        opened => opened,
    }
}

/// `transfer`, and once more through the cache when the file system does not do it past the cache after all.
fn transfer<T>(file: &File, mut transfer: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    match transfer() {
        Err(cause) if cause.kind() == ErrorKind::InvalidInput => {
            fcntl_setfl(file, fcntl_getfl(file)? & !OFlags::DIRECT)?;
            transfer()
        }
        done => done,
    }
}

/// Why a file is not there as it was to be written.
#[derive(Debug)]
pub(super) enum Unwritten {
    /// It could not be written.
    Writing(io::Error),
    /// It could not be read back.
    Reading(io::Error),
    /// What was read back is not what was written.
    Differs(Range<u64>),
}

/// Writes `chunks`, one after the other, as the file at `path`, and reads back and compares each piece once the next is
/// written: while the disk serves one thread, another has something to compute. The file appears whole and proved and is on the
/// disk then: its bytes and its name, and the folders that had to be made. A file that was there is replaced.
///
/// `see` gets the place of each chunk, right before it is written: whoever needs its bytes too has them in the processor's cache.
pub(super) fn write(path: &Path, chunks: &[Bytes], see: impl FnMut(usize)) -> Result<(), Unwritten> {
    let writing = Unwritten::Writing;
    let folder = path.parent().ok_or(writing(ErrorKind::InvalidInput.into()))?;
    make_folders(folder).map_err(writing)?;
    let (staged, file) = stage(path).map_err(writing)?;
    let written = Reader::open(&staged).map_err(Unwritten::Reading).and_then(|reader| {
        fill(&file, reader, chunks, see)?;
        file.sync_all().and_then(|()| std::fs::rename(&staged, path)).map_err(writing)
    });
    if let Err(cause) = written {
        // What could not be written whole is of no use.
        let _ = std::fs::remove_file(&staged);
        return Err(cause);
    }
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(writing)
}

/// A new file beside `path`, named as the other writer of a folder names what is not whole: `NAME#N`.
fn stage(path: &Path) -> io::Result<(PathBuf, File)> {
    for number in 1u64.. {
        let mut name = path.as_os_str().to_owned();
        name.push(format!("#{number}"));
        let staged = PathBuf::from(name);
        match open(OpenOptions::new().write(true).create_new(true), &staged) {
            Err(cause) if cause.kind() == ErrorKind::AlreadyExists => {}
            opened => return opened.map(|file| (staged, file)),
        }
    }
    unreachable!("there are not so many files")
}

fn fill(
    file: &File,
    mut reader: Reader,
    chunks: &[Bytes],
    mut see: impl FnMut(usize),
) -> Result<(), Unwritten> {
    let mut staging = Staging::new();
    let (mut filled, mut at) = (0, 0);
    // What was written and not read back yet begins here, and lies here among the chunks.
    let (mut proved, mut expected) = (0, Place::default());
    let mut put = |staging: &mut Staging, filled: usize, at: &mut u64| {
        let whole = up(filled as u64) as usize;
        staging.bytes()[filled..whole].fill(0);
        transfer(file, || file.write_all_at(&staging.bytes()[..whole], *at)).map_err(Unwritten::Writing)?;
        prove(&mut reader, proved..*at, chunks, &mut expected)?;
        proved = *at;
        *at += filled as u64;
        Ok(())
    };
    for (number, chunk) in chunks.iter().enumerate() {
        see(number);
        let mut rest = &chunk[..];
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(PIECE - filled));
            staging.bytes()[filled..filled + now.len()].copy_from_slice(now);
            (filled, rest) = (filled + now.len(), later);
            if filled == PIECE {
                put(&mut staging, filled, &mut at)?;
                filled = 0;
            }
        }
    }
    put(&mut staging, filled, &mut at)?;
    // The last write may have reached further.
    file.set_len(at).map_err(Unwritten::Writing)?;
    prove(&mut reader, proved..at, chunks, &mut expected)
}

/// A place in the bytes of several chunks.
#[derive(Default)]
struct Place {
    chunk: usize,
    byte: usize,
}

/// An error unless these bytes of the file are those of the chunks from `expected` on, which moves on behind them.
fn prove(
    reader: &mut Reader,
    range: Range<u64>,
    chunks: &[Bytes],
    expected: &mut Place,
) -> Result<(), Unwritten> {
    let mut read = reader.read(range.clone()).map_err(Unwritten::Reading)?;
    while !read.is_empty() {
        let rest = &chunks[expected.chunk][expected.byte..];
        let (now, later) = read.split_at(read.len().min(rest.len()));
        if now != &rest[..now.len()] {
            return Err(Unwritten::Differs(range));
        }
        read = later;
        if now.len() == rest.len() {
            *expected = Place { chunk: expected.chunk + 1, byte: 0 };
        } else {
            expected.byte += now.len();
        }
    }
    Ok(())
}

/// Makes what is missing of `folder`, so that it is there after a power cut.
fn make_folders(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let above = folder.parent().ok_or(ErrorKind::NotFound)?;
    make_folders(above)?;
    match std::fs::create_dir(folder) {
        Err(cause) if cause.kind() != ErrorKind::AlreadyExists => Err(cause),
        _ => File::open(above)?.sync_all(),
    }
}

/// A file that is read piece by piece.
pub struct Reader {
    file: File,
    size: u64,
    staging: Staging,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("file", &self.file).field("size", &self.size).finish_non_exhaustive()
    }
}

impl Reader {
    /// Most bytes that may be asked for at a time.
    pub const MOST: u64 = PIECE as u64;

    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = open(OpenOptions::new().read(true), path)?;
        let size = file.metadata()?.len();
        Ok(Self { file, size, staging: Staging::new() })
    }

    /// Bytes of the file when it was opened.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// These bytes of the file. An error where the file ends before them. Panics when they are more than [`Reader::MOST`].
    pub fn read(&mut self, range: Range<u64>) -> io::Result<&[u8]> {
        let Range { start, end } = range;
        assert!(start <= end && end - start <= Self::MOST, "{} bytes at a time", Self::MOST);
        let first = start - start % ALIGNMENT as u64;
        let (wanted, most) = ((end - first) as usize, up(end - first) as usize);
        let (file, target) = (&self.file, &mut self.staging.bytes()[..most]);
        let mut filled = 0;
        while filled < wanted {
            // Where a read ends within a block, it was the file that ended.
            match transfer(file, || file.read_at(&mut target[filled..], first + filled as u64)) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(read) => filled += read,
                Err(cause) if cause.kind() == ErrorKind::Interrupted => {}
                Err(cause) => return Err(cause),
            }
        }
        Ok(&target[(start - first) as usize..wanted])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at * 31 % 251) as u8).collect()
    }

    #[test]
    fn a_file_of_any_size_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/er/file");
        for length in
            [0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 777]
        {
            let bytes = numbers(length);
            let chunks: Vec<Bytes> = bytes.chunks(100_003).map(Bytes::copy_from_slice).collect();
            let mut seen = Vec::new();
            write(&path, &chunks, |chunk| seen.push(chunk)).unwrap();
            assert_eq!(seen, (0..chunks.len()).collect::<Vec<_>>());
            assert!(std::fs::read(&path).unwrap() == bytes, "{length} bytes");
            let mut reader = Reader::open(&path).unwrap();
            assert_eq!(reader.size(), length as u64);
            for (at, piece) in bytes.chunks(300_007).enumerate() {
                let start = at as u64 * 300_007;
                assert!(reader.read(start..start + piece.len() as u64).unwrap() == piece, "{length} bytes");
            }
            let past = reader.read(length as u64..length as u64 + 1).unwrap_err();
            assert_eq!(past.kind(), ErrorKind::UnexpectedEof, "{length} bytes");
        }
        let names: Vec<_> =
            std::fs::read_dir(path.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["file"], "nothing is left beside it");
    }

    /// What is compared is every byte of the file with every chunk, wherever pieces and chunks end.
    #[test]
    fn a_byte_that_is_not_as_it_was_written_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let (path, length) = (folder.path().join("file"), 3 * ALIGNMENT + 50);
        let chunks: Vec<Bytes> = numbers(length).chunks(777).map(Bytes::copy_from_slice).collect();
        write(&path, &chunks, |_| ()).unwrap();
        let found = || {
            let (mut reader, mut place, mut at) = (Reader::open(&path).unwrap(), Place::default(), 0);
            let mut ends = [100, ALIGNMENT, length].into_iter().map(|end| end as u64);
            ends.try_for_each(|end| {
                prove(&mut reader, std::mem::replace(&mut at, end)..end, &chunks, &mut place)
            })
        };
        found().unwrap();
        for (at, range) in [(0, 0..100), (776, 100..4096), (4096, 4096..12_338), (length - 1, 4096..12_338)] {
            let mut bytes = numbers(length);
            bytes[at] ^= 1;
            std::fs::write(&path, bytes).unwrap();
            let told = found().unwrap_err();
            assert!(matches!(&told, Unwritten::Differs(there) if *there == range), "byte {at}: {told:?}");
        }
        std::fs::write(&path, &numbers(length)[1..]).unwrap();
        assert!(found().is_err(), "it is shorter, and all is elsewhere");
    }

    /// In memory there is no disk to write to past a cache.
    #[test]
    fn a_file_system_without_it_serves_as_well() {
        let Ok(folder) = tempfile::tempdir_in("/dev/shm") else {
            return println!("SKIPPED: there is no /dev/shm");
        };
        let (path, bytes) = (folder.path().join("file"), numbers(PIECE + 5));
        write(&path, &[bytes.clone().into()], |_| ()).unwrap();
        let mut reader = Reader::open(&path).unwrap();
        assert!(reader.read(3..2_000_000).unwrap() == &bytes[3..2_000_000]);
    }

    #[test]
    fn what_cannot_be_written_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::create_dir_all(path.join("in the way")).unwrap();
        let refused = write(&path, &[numbers(10).into()], |_| ()).unwrap_err();
        assert!(matches!(refused, Unwritten::Writing(_)), "{refused:?}");
        let names: Vec<_> =
            std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["file"]);
    }
}
