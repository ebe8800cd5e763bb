//go:build race

package nbd

// raced: the race detector watches, ten times slower.
const raced = true
