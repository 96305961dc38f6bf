//! Tokenized Parquet in, packed token batches out. Knows nothing of models or rings.
