// Package cache keeps a host's copies of a store's packs and index objects, so
// that each leaves the store once however many guests read it.
//
// What goes in: a store and a directory with a limit. What comes out: ranges of
// objects, by [Cache.Get], by HTTP with [Serve], or as an [upload.Store] whose
// reads go by way of a cache, with [Wrap]. It touches the directory and the store,
// which it only reads.
//
// Objects are named by the SHA-256 of their bytes: what is kept was compared
// with its name, without any key. Of a pack that is not here yet, what was asked
// for is fetched first and handed on as it comes: readers verify every chunk they
// open. Index objects are handed out whole and compared. Nothing else is cached:
// heads, manifests, keys and traces may change, and come from the store.
//
// A file of the directory has its name when it is whole; what a crash leaves is
// removed by the next [Open]. When the disk is full, objects are passed on
// without being kept. The package does not log, but for what [Serve] is given to
// log to. Its methods may be called concurrently.
package cache
