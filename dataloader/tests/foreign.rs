//! Files that others write: every list type, width, encoding, page version and codec, and what is wrong with some.

mod common;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use anello_dataloader::{Dataset, Documents, Error, Index};
use anello_store::Store;
use arrow::array::{
    Array, ArrayRef, BooleanArray, FixedSizeListArray, Int32Array, Int64Array, LargeListArray, ListArray,
    RecordBatch, StringArray, UInt8Array, UInt16Array, UInt32Array,
};
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::datatypes::{Field, Schema};
use common::url;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, Encoding};
use parquet::file::properties::{WriterProperties, WriterPropertiesBuilder, WriterVersion};
use parquet::schema::types::ColumnPath;

const ROWS: [&[i32]; 6] = [&[5, 6, 7, 8], &[9], &[], &[250, 3, 3, 3, 3, 1], &[2, 2], &[40, 41, 42]];

fn offsets(rows: &[&[i32]]) -> Vec<usize> {
    let mut end = 0;
    std::iter::once(0)
        .chain(rows.iter().map(|row| {
            end += row.len();
            end
        }))
        .collect()
}

fn list(values: ArrayRef, rows: &[&[i32]], nullable: bool) -> ArrayRef {
    let offsets = OffsetBuffer::new(offsets(rows).into_iter().map(|o| o as i32).collect::<Vec<_>>().into());
    let item = Arc::new(Field::new("item", values.data_type().clone(), nullable));
    Arc::new(ListArray::new(item, offsets, values, None))
}

fn large_list(values: ArrayRef, rows: &[&[i32]]) -> ArrayRef {
    let offsets = OffsetBuffer::new(offsets(rows).into_iter().map(|o| o as i64).collect::<Vec<_>>().into());
    let item = Arc::new(Field::new("item", values.data_type().clone(), true));
    Arc::new(LargeListArray::new(item, offsets, values, None))
}

fn widths(ids: &[i32]) -> Vec<ArrayRef> {
    vec![
        Arc::new(Int32Array::from(ids.to_vec())),
        Arc::new(UInt8Array::from_iter_values(ids.iter().map(|id| *id as u8))),
        Arc::new(UInt16Array::from_iter_values(ids.iter().map(|id| *id as u16))),
        Arc::new(UInt32Array::from_iter_values(ids.iter().map(|id| *id as u32))),
        Arc::new(Int64Array::from_iter_values(ids.iter().map(|id| i64::from(*id)))),
    ]
}

fn write(path: &Path, columns: &[(&str, ArrayRef)], nullable: bool, properties: WriterPropertiesBuilder) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let fields = columns.iter().map(|(name, a)| Field::new(*name, a.data_type().clone(), nullable));
    let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
    let file = std::fs::File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, schema.clone(), Some(properties.build())).unwrap();
    let columns = columns.iter().map(|(_, array)| array.clone()).collect();
    writer.write(&RecordBatch::try_new(schema, columns).unwrap()).unwrap();
    writer.close().unwrap();
}

fn read(path: &Path) -> Result<Documents, Error> {
    Dataset::open(&url(path.parent().unwrap()))?.read(0, None)
}

fn rows_of(documents: &Documents) -> Vec<Vec<i32>> {
    documents.iter().map(|d| d.tokens.to_vec()).collect()
}

#[test]
fn every_list_type_and_width_reads_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    for values in widths(&ROWS.concat()) {
        for array in [
            list(values.clone(), &ROWS, true),
            list(values.clone(), &ROWS, false),
            large_list(values.clone(), &ROWS),
        ] {
            for nullable in [true, false] {
                write(&path, &[("input_ids", array.clone())], nullable, WriterProperties::builder());
                assert_eq!(rows_of(&read(&path).unwrap()), ROWS, "{} nullable {nullable}", array.data_type());
            }
        }
        let item = Arc::new(Field::new("item", values.data_type().clone(), true));
        let fixed: ArrayRef = Arc::new(FixedSizeListArray::new(item, 4, values.slice(0, 16), None));
        write(&path, &[("input_ids", fixed)], true, WriterProperties::builder());
        let ids = ROWS.concat();
        assert_eq!(rows_of(&read(&path).unwrap()), ids.chunks(4).map(<[i32]>::to_vec).collect::<Vec<_>>());
    }
}

#[test]
fn every_encoding_page_version_and_codec_reads_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    // Enough for several pages.
    let rows: Vec<Vec<i32>> =
        (0..500).map(|r| (0..r % 37).map(|i| (r * 31 + i * i * 7) % 49152).collect()).collect();
    let slices: Vec<&[i32]> = rows.iter().map(Vec::as_slice).collect();
    let narrow: ArrayRef = Arc::new(Int32Array::from(rows.concat()));
    let wide: ArrayRef = Arc::new(Int64Array::from_iter_values(rows.concat().into_iter().map(i64::from)));
    let codecs = [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::ZSTD(Default::default()),
        Compression::GZIP(Default::default()),
        Compression::LZ4_RAW,
        Compression::LZ4,
    ];
    let encodings =
        [None, Some(Encoding::PLAIN), Some(Encoding::DELTA_BINARY_PACKED), Some(Encoding::BYTE_STREAM_SPLIT)];
    for values in [narrow, wide] {
        for version in [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0] {
            for codec in codecs {
                for encoding in encodings {
                    let mut properties = WriterProperties::builder()
                        .set_writer_version(version)
                        .set_compression(codec)
                        .set_data_page_row_count_limit(64)
                        .set_write_batch_size(16)
                        .set_dictionary_enabled(encoding.is_none());
                    if let Some(encoding) = encoding {
                        let column = ColumnPath::from(vec![
                            "input_ids".to_owned(),
                            "list".to_owned(),
                            "item".to_owned(),
                        ]);
                        properties = properties.set_column_encoding(column, encoding);
                    }
                    write(&path, &[("input_ids", list(values.clone(), &slices, true))], true, properties);
                    let read = read(&path).unwrap();
                    assert_eq!(rows_of(&read), rows, "{version:?} {codec:?} {encoding:?}");
                }
            }
        }
    }
}

#[test]
fn other_columns_are_left_alone_and_masks_and_labels_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let ids: ArrayRef = Arc::new(Int32Array::from(ROWS.concat()));
    let flags: Vec<u8> = ROWS.concat().iter().map(|id| u8::from(id % 2 == 0)).collect();
    let text: ArrayRef = Arc::new(StringArray::from(vec!["a"; 6]));
    let masks: [(&str, ArrayRef); 4] = [
        ("loss_mask", Arc::new(BooleanArray::from_iter(flags.iter().map(|f| Some(*f == 1))))),
        ("loss_mask", Arc::new(UInt8Array::from(flags.clone()))),
        ("loss_mask", Arc::new(Int64Array::from_iter_values(flags.iter().map(|f| i64::from(*f))))),
        (
            "labels",
            Arc::new(Int64Array::from_iter_values(
                ROWS.concat().iter().zip(&flags).map(|(id, f)| if *f == 1 { i64::from(*id) } else { -100 }),
            )),
        ),
    ];
    for (name, mask) in masks {
        let columns = [
            ("text", text.clone()),
            (name, list(mask.clone(), &ROWS, true)),
            ("input_ids", list(ids.clone(), &ROWS, true)),
        ];
        write(&path, &columns, true, WriterProperties::builder());
        let documents = read(&path).unwrap();
        assert_eq!(rows_of(&documents), ROWS);
        let read: Vec<u8> = documents.iter().flat_map(|d| d.counted.unwrap().to_vec()).collect();
        assert_eq!(read, flags, "{name} {}", mask.data_type());
    }
    write(&path, &[("input_ids", list(ids, &ROWS, true))], true, WriterProperties::builder());
    assert!(read(&path).unwrap().iter().all(|d| d.counted.is_none()));
}

#[test]
fn rows_that_cannot_be_trained_on_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let fault = |columns: &[(&str, ArrayRef)]| {
        write(&path, columns, true, WriterProperties::builder());
        let error = read(&path).unwrap_err();
        assert!(!matches!(error, Error::Row { .. }) || error.is_corrupt());
        error.to_string()
    };
    let ids =
        |ids: &[i64]| list(Arc::new(Int64Array::from(ids.to_vec())), &[&[0, 0], &[0], &[0, 0, 0]], true);

    let null: ArrayRef = Arc::new(Int32Array::from(vec![Some(1), Some(2), Some(3), Some(4), None, Some(6)]));
    let said = fault(&[("input_ids", list(null, &[&[0, 0], &[0], &[0, 0, 0]], true))]);
    assert!(said.contains("a.parquet: row group 0, row 2: input_ids holds a null"), "{said}");

    let values: ArrayRef = Arc::new(Int32Array::from(vec![1, 2, 3]));
    let item = Arc::new(Field::new("item", values.data_type().clone(), true));
    let offsets = OffsetBuffer::new(vec![0, 2, 2, 3].into());
    let nulls = Some(NullBuffer::from(vec![true, false, true]));
    let said = fault(&[("input_ids", Arc::new(ListArray::new(item, offsets, values, nulls)))]);
    assert!(said.contains("row group 0, row 1: input_ids is null"), "{said}");

    let said = fault(&[("input_ids", ids(&[1, 2, 3, 1 << 31, 5, 6]))]);
    assert!(
        said.contains("row group 0, row 2: input_ids holds 2147483648, outside 0..=2147483647"),
        "{said}"
    );
    let said = fault(&[("input_ids", ids(&[1, 2, -3, 4, 5, 6]))]);
    assert!(said.contains("row group 0, row 1: input_ids holds -3"), "{said}");
    let unsigned: ArrayRef = Arc::new(UInt32Array::from(vec![1, u32::MAX]));
    let said = fault(&[("input_ids", list(unsigned, &[&[0, 0]], true))]);
    assert!(said.contains("row 0: input_ids holds 4294967295"), "{said}");

    let good = ids(&[1, 2, 3, 4, 5, 6]);
    let said = fault(&[("input_ids", good.clone()), ("labels", ids(&[1, 2, 3, 4, 7, -100]))]);
    assert!(said.contains("row 2: a label is 7 where the token is 5"), "{said}");
    let short = list(Arc::new(UInt8Array::from(vec![1; 6])), &[&[0, 0], &[0, 0], &[0, 0]], true);
    let said = fault(&[("input_ids", good.clone()), ("loss_mask", short)]);
    assert!(said.contains("row 1: loss_mask and input_ids have different lengths"), "{said}");

    write(&path, &[("input_ids", good)], true, WriterProperties::builder());
    let said = Dataset::open(&url(folder.path())).unwrap().read(0, Some(6)).unwrap_err().to_string();
    assert!(said.contains("row 2: input_ids holds 6, the vocabulary has 6"), "{said}");
}

#[test]
fn shards_without_usable_tokens_say_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let fault = |columns: &[(&str, ArrayRef)]| {
        write(&path, columns, true, WriterProperties::builder());
        read(&path).unwrap_err().to_string()
    };
    let text: ArrayRef = Arc::new(StringArray::from(vec!["a", "b"]));
    let said = fault(&[("text", text.clone())]);
    assert!(said.contains("a.parquet: has no column input_ids, only text; make token shards with"), "{said}");
    let said = fault(&[("input_ids", text)]);
    assert!(said.contains("column input_ids is BYTE_ARRAY with 0 levels of lists"), "{said}");
    let said = fault(&[("input_ids", Arc::new(Int32Array::from(vec![1, 2])))]);
    assert!(said.contains("column input_ids is INT32 with 0 levels of lists"), "{said}");
    let empty: ArrayRef = Arc::new(Int32Array::from(Vec::<i32>::new()));
    let said = fault(&[("input_ids", list(empty.clone(), &[], true))]);
    assert!(said.contains("its shards hold no document"), "{said}");
    let said = fault(&[("input_ids", list(empty, &[&[], &[]], true))]);
    assert!(said.contains("row group 0") && said.contains("none of its documents has a token"), "{said}");
    std::fs::write(&path, b"PAR1 no parquet at all PAR1").unwrap();
    let said = read(&path).unwrap_err().to_string();
    assert!(said.contains("a.parquet: its Parquet footer cannot be read"), "{said}");
}

/// Damage anywhere in the token columns: with checksums always found; without, never a crash, and never other rows
/// than the footer tells of.
#[test]
fn flipped_bytes_are_found_by_checksums_and_never_crash_the_decoder() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let rows: Vec<Vec<i32>> =
        (0..60).map(|r| (0..r % 17).map(|i| (r * 31 + i * 7) % 500).collect()).collect();
    let slices: Vec<&[i32]> = rows.iter().map(Vec::as_slice).collect();
    let array = list(Arc::new(Int32Array::from(rows.concat())), &slices, true);
    for codec in [Compression::ZSTD(Default::default()), Compression::SNAPPY, Compression::UNCOMPRESSED] {
        let properties = WriterProperties::builder().set_compression(codec);
        write(&path, &[("input_ids", array.clone())], true, properties);
        let good = std::fs::read(&path).unwrap();
        let store = Store::open(&url(folder.path())).unwrap();
        let build = |checksums| Index::build(&store, checksums, 1, &|_| ControlFlow::Continue(())).unwrap();
        let checked = Dataset::new(store.clone(), build(true)).unwrap();
        let plain = Dataset::new(store.clone(), build(false)).unwrap();
        assert_eq!(rows_of(&checked.read(0, None).unwrap()), rows);
        let footer = u32::from_le_bytes(good[good.len() - 8..good.len() - 4].try_into().unwrap()) as usize;
        // The page and column indices lie between the data and the footer; the chunk ends before them.
        let end = good.len() - 8 - footer;
        let (mut found, mut tried) = (0, 0);
        for at in (4..end).step_by(3) {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            std::fs::write(&path, bad).unwrap();
            tried += 1;
            match checked.read(0, None) {
                Err(error) => {
                    assert!(matches!(error, Error::Corrupt { row_group: 0, .. }), "{error}");
                    found += 1;
                }
                Ok(documents) => assert_eq!(rows_of(&documents), rows, "byte {at} is outside the chunk"),
            }
            if let Ok(documents) = plain.read(0, None) {
                assert_eq!(documents.len(), rows.len());
            }
        }
        assert!(found * 10 > tried * 7, "{found} of {tried} flips lie in the column chunk");
    }
}
