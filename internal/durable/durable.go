// Package durable makes files appear under their names whole and on disk, or
// not at all, whenever the machine stops; and reads them back.
//
// What goes in: a path and what the file there is to hold. What comes out: that
// file, or what it holds. It touches the file and its directory, in which a temporary file may be
// left by a kill: its name begins with [Temp].
package durable

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Temp is how the names of temporary files begin.
const Temp = ".instar-new-"

// Replace makes a file of data, in the place of one that is there.
func Replace(path string, mode fs.FileMode, data []byte) error {
	return Fill(path, mode, func(f *os.File) error {
		_, err := f.Write(data)
		return err
	})
}

// Create makes a file of data where none is; one that is there stays, and is
// fs.ErrExist.
func Create(path string, mode fs.FileMode, data []byte) error {
	return appear(path, mode, func(f *os.File) error {
		_, err := f.Write(data)
		return err
	}, func(temp string) error {
		if err := os.Link(temp, path); err != nil { // unlike a rename it replaces nothing
			return err
		}
		return os.Remove(temp)
	})
}

// Fill lets fill write a file, that then takes the place of one that is there.
func Fill(path string, mode fs.FileMode, fill func(*os.File) error) error {
	return appear(path, mode, fill, func(temp string) error { return os.Rename(temp, path) })
}

// appear has a file filled beside its place, put on disk, and placed.
func appear(path string, mode fs.FileMode, fill func(*os.File) error, place func(temp string) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), Temp) // 0600 from the first byte
	if err != nil {
		return err
	}
	defer func() {
		if err == nil {
			return
		}
		if rerr := os.Remove(f.Name()); !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}()
	err = fill(f)
	if err == nil && mode != 0o600 { // filesystems without modes refuse to change them
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := place(f.Name()); err != nil {
		return err
	}
	if err := SyncDir(filepath.Dir(path)); err != nil {
		// The name is there, and nothing to be taken back: who asked is not to
		// build on it.
		return fmt.Errorf("%s is there, but may not outlive a power cut: %w", path, err)
	}
	return nil
}

// Read reads back a file of at most limit bytes. It follows no link, and does not
// wait where there is a pipe in the file's place.
func Read(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("longer than %d bytes", limit)
	}
	return data, nil
}

// SyncDir puts a directory's names on disk. Filesystems that have no such thing
// (EINVAL) are taken at their word.
func SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	err = d.Sync()
	if errors.Is(err, unix.EINVAL) {
		err = nil
	}
	return errors.Join(err, d.Close())
}
