package filetree

import (
	"context"
	"errors"
	"io"
)

// Errors of a [Source], to be wrapped.
var (
	// ErrVanished: no file is found any more where the tree has one.
	ErrVanished = errors.New("file vanished")
	// ErrReplaced: another file stands where the tree has one.
	ErrReplaced = errors.New("file was replaced")
)

// Source opens the content of a tree's regular files: for who writes the
// content somewhere; made by who walked the hierarchy.
type Source interface {
	// Open opens the file for reading, without ever blocking on a FIFO or
	// following a symbolic link put in its place. Its error wraps
	// ErrVanished or ErrReplaced where that is the reason. It may be called
	// from several goroutines at once.
	Open(ctx context.Context, id ID) (File, error)
}

// File is an open file of a [Source]. ReadAt gives what is there now: less
// than the tree's size (io.EOF) if the file shrank.
type File interface {
	io.ReaderAt
	io.Closer
	// Changed tells whether size, modification or change time differ from
	// the tree's by now. It is asked after the last read.
	Changed() (bool, error)
}
