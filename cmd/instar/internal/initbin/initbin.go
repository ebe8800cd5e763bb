// Package initbin carries the initrd's init inside instar, so that one file is
// all an operator needs. "make build" puts it there, compressed, for the
// architecture it builds for; a plain "go build" leaves it out.
//
// Nothing goes in. What comes out is a file in memory.
package initbin

import (
	"compress/gzip"
	"embed"
	"fmt"
	"io"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

//go:embed all:bin
var bin embed.FS

// File unpacks instar-init into memory and returns it with a path that this
// process can open until it closes the file. The error wraps fs.ErrNotExist
// when instar was built without it.
func File() (f *os.File, path string, err error) {
	packed, err := bin.Open("bin/instar-init-" + runtime.GOARCH + ".gz")
	if err != nil {
		return nil, "", err
	}
	defer packed.Close()
	z, err := gzip.NewReader(packed)
	if err != nil {
		return nil, "", fmt.Errorf("unpacking the built-in instar-init: %w", err)
	}
	fd, err := unix.MemfdCreate("instar-init", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, "", fmt.Errorf("unpacking the built-in instar-init into memory: %w", err)
	}
	f = os.NewFile(uintptr(fd), "instar-init (built in)")
	if _, err := io.Copy(f, z); err != nil {
		f.Close()
		return nil, "", fmt.Errorf("unpacking the built-in instar-init: %w", err)
	}
	return f, fmt.Sprintf("/proc/self/fd/%d", fd), nil
}
