// Package catalog keeps the catalog of a region's images in the very store
// they lie in: what is registered under which id and name, by whom, who may
// launch it, its tags and attributes, and the key pairs and accounts of the
// region. FORMAT.md has the objects byte for byte; there is no other database.
//
// What goes in: an open [upload.Store] whose writes can be made conditional,
// whom to trust, and for changes a key that signs. What comes out: [View], the
// catalog at one moment, verified, and operations ([Catalog.Register],
// [Catalog.Copy] and so on) that judge permissions and answer with EC2's error
// codes ([Error]). It touches that store below catalog/, what an image that is
// registered or copied consists of, and under [Options.State] a file that
// remembers the newest state seen.
//
// The catalog is linearizable: every View is of a state that was the newest at
// some moment of the call, every change is a compare-and-swap of one signed
// object. Any number of processes may use it at once and stop dead anywhere.
//
// The package does not log. Its methods may be called concurrently.
package catalog
