// Package chunked is the Instar image format: chunks that a store holds once,
// sealed, in packs; the index that lays them out as streams; and the signed
// documents that name an image. SPEC.md beside it is the format, byte-exact.
//
// Streams go in through a [Writer], which hands finished packs and index
// objects to the caller's [Sink]; a [Source] gives them back, and an [Index]
// reads any byte of them or, with [Restore], all. The package touches neither
// network nor disk, and uses nothing that it read back before its tag and
// digest are right.
package chunked
