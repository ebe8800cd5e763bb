//go:build race

package lazyroot

// raced: the race detector watches, ten times slower.
const raced = true
