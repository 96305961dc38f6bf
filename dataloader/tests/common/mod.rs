//! Small token sets on disk.
#![allow(dead_code)] // each test binary uses its part

use std::path::Path;

use anello_dataloader::{ShardFormat, ShardWriter};

/// Documents with unique tokens: document `d` has `1 + (d * 7) % 23` of them.
pub fn documents(count: usize) -> Vec<Vec<i32>> {
    let mut next = 0;
    (0..count)
        .map(|d| {
            let length = 1 + (d as i32 * 7) % 23;
            next += length;
            (next - length..next).collect()
        })
        .collect()
}

/// Writes `documents` as `shards` shards with row groups of about `row_group_tokens`.
pub fn write_set(folder: &Path, documents: &[Vec<i32>], shards: usize, row_group_tokens: u64) {
    std::fs::create_dir_all(folder).unwrap();
    for (at, part) in documents.chunks(documents.len().div_ceil(shards)).enumerate() {
        let format = ShardFormat { row_group_tokens, zstd_level: 1 };
        let mut writer = ShardWriter::new(format, false, None).unwrap();
        part.iter().for_each(|ids| writer.push(ids, None).unwrap());
        std::fs::write(folder.join(format!("{at:03}.parquet")), writer.finish().unwrap().bytes).unwrap();
    }
}

/// `path` as a URL that [`anello_store::Store`] opens.
pub fn url(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}
