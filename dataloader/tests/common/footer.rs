//! Parquet whose footer lies.

use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader, ParquetMetaDataWriter};

/// The shard `good` with a footer that claims so many rows, or values, of its first row group; absent: as many as there are.
pub fn lying(good: &[u8], rows: Option<i64>, values: Option<i64>) -> Vec<u8> {
    let footer = u32::from_le_bytes(*good[..good.len() - 4].last_chunk().unwrap()) as usize;
    let body = good.len() - 8 - footer;
    let metadata = ParquetMetaDataReader::decode_metadata(&good[body..good.len() - 8]).unwrap();
    let claims = metadata.row_groups().iter().enumerate().map(|(at, group)| {
        let (rows, values) = if at == 0 { (rows, values) } else { (None, None) };
        let columns = group.columns().iter().map(|column| {
            let values = values.unwrap_or(column.num_values());
            column.clone().into_builder().set_num_values(values).build().unwrap()
        });
        let builder = group.clone().into_builder().set_num_rows(rows.unwrap_or(group.num_rows()));
        builder.set_column_metadata(columns.collect()).build().unwrap()
    });
    let claimed = ParquetMetaData::new(metadata.file_metadata().clone(), claims.collect());
    let mut bad = good[..body].to_vec();
    ParquetMetaDataWriter::new(&mut bad, &claimed).finish().unwrap();
    bad
}
