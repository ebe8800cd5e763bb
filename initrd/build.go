// Package initrd builds the initial ramdisk that boots an image: an executable
// as /init, kernel modules with what they depend on, a configuration and the
// certificates to trust.
//
// In go files of this machine or of a root directory; out comes one compressed
// cpio archive whose bytes depend on nothing else. No Go toolchain and no other
// program is needed. What runs inside is package boot.
package initrd

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/initrd/boot"
)

// Compression of the archive.
type Compression string

// Compressions that Linux unpacks. Zstandard needs Linux 5.9.
const (
	Zstd Compression = "zstd"
	Gzip Compression = "gzip"
	None Compression = "none"
)

// Options say what goes into an initrd.
type Options struct {
	// Init is the executable that becomes /init: static, of the target's
	// architecture. Required.
	Init string
	// Modules is a modules directory (lib/modules/VERSION) or a root directory
	// that has one. nil: no modules, for a kernel that has all built in.
	Modules fs.FS
	// Version of the kernel where Modules is a root with several.
	Version string
	// ModuleNames are the modules to take, an absent one being an error, beside
	// those of a root's filesystem. nil: those of DefaultModules that are there.
	ModuleNames []string
	// Config is built in; kernel parameters override what it says.
	Config boot.Config
	// CACerts (PEM) are trusted for TLS besides none: a ticket may narrow this.
	CACerts []byte
	// Signers is whose Instar images are started: an allowed_signers file. nil
	// leaves it to the tickets, which can narrow it but not widen it.
	Signers []byte
	// Shell is a static shell for rescue, "" for none. Config.Shell must
	// allow its use.
	Shell string
	// Compression: "" is Zstd.
	Compression Compression
}

// Part is one part of an initrd.
type Part struct {
	Name   string
	Files  int
	Bytes  int64 // before compression
	Stored int64 // of the initrd
}

// Report says what an initrd is made of.
type Report struct {
	Arch    string   // of /init, as ELF says: EM_X86_64, EM_AARCH64
	Version string   // of the kernel whose modules are in it, "" for none
	Modules []string // in the order they are loaded
	Absent  []string // modules of DefaultModules that the kernel does not have
	Parts   []Part
	Stored  int64 // bytes of the initrd
}

// Build writes an initrd to w. The same options and files give the same bytes.
func Build(ctx context.Context, o Options, w io.Writer) (*Report, error) {
	b := &builder{o: o, report: &Report{}}
	parts := []struct {
		name string
		make func() ([]cpio.Record, error)
	}{
		{"directories", b.directories},
		{"init", b.init},
		{"shell", b.shell},
		{"modules", b.modules},
		{"configuration", b.configuration},
	}
	out := &counter{w: w}
	z, err := compressor(out, o.Compression)
	if err != nil {
		return nil, err
	}
	archive := &counter{w: z}
	rw := cpio.Newc.Writer(archive)
	for _, p := range parts {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		records, err := p.make()
		if err != nil {
			return nil, fmt.Errorf("building an initrd: %w", err)
		}
		if len(records) == 0 {
			continue
		}
		before, stored := archive.n, out.n
		for _, r := range records {
			b.inode++
			r = cpio.MakeReproducible(r)
			r.Ino = b.inode
			if err := rw.WriteRecord(r); err != nil {
				return nil, fmt.Errorf("building an initrd: writing %s: %w", r.Name, err)
			}
		}
		// So that each part's share of the initrd is known.
		if err := z.Flush(); err != nil {
			return nil, fmt.Errorf("building an initrd: %w", err)
		}
		b.report.Parts = append(b.report.Parts, Part{Name: p.name, Files: len(records), Bytes: archive.n - before, Stored: out.n - stored})
	}
	if err := cpio.WriteTrailer(rw); err != nil {
		return nil, fmt.Errorf("building an initrd: %w", err)
	}
	if err := z.Close(); err != nil {
		return nil, fmt.Errorf("building an initrd: %w", err)
	}
	b.report.Stored = out.n
	return b.report, nil
}

// counter counts what passes.
type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

type flusher interface {
	io.WriteCloser
	Flush() error
}

type plain struct{ io.Writer }

func (plain) Flush() error { return nil }
func (plain) Close() error { return nil }

func compressor(w io.Writer, c Compression) (flusher, error) {
	switch c {
	case None:
		return plain{w}, nil
	case Gzip:
		return gzip.NewWriterLevel(w, gzip.BestCompression)
	case Zstd, "":
		// One goroutine: the bytes must not depend on the number of cores.
		return zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1))
	}
	return nil, fmt.Errorf("building an initrd: unknown compression %q: it is zstd, gzip or none", c)
}

type builder struct {
	o      Options
	report *Report
	inode  uint64
}

// directories are those that boot mounts on or writes to, and the console
// that the kernel opens before anything is mounted.
func (b *builder) directories() ([]cpio.Record, error) {
	var records []cpio.Record
	for _, d := range []string{"bin", "dev", "etc", "etc/instar", "lib", "lib/modules", "proc", "root", "run", "sys", "tmp"} {
		records = append(records, cpio.Directory(d, 0o755))
	}
	return append(records, cpio.CharDev("dev/console", 0o600, 5, 1), cpio.CharDev("dev/null", 0o666, 1, 3)), nil
}

func (b *builder) init() ([]cpio.Record, error) {
	data, machine, err := readStatic(b.o.Init)
	if err != nil {
		return nil, err
	}
	b.report.Arch = machine.String()
	return []cpio.Record{cpio.StaticFile("init", string(data), 0o755)}, nil
}

func (b *builder) shell() ([]cpio.Record, error) {
	if b.o.Shell == "" {
		return nil, nil
	}
	data, machine, err := readStatic(b.o.Shell)
	if err != nil {
		return nil, err
	}
	if machine.String() != b.report.Arch {
		return nil, fmt.Errorf("shell %s is for %v, /init for %s", b.o.Shell, machine, b.report.Arch)
	}
	return []cpio.Record{cpio.StaticFile("bin/sh", string(data), 0o755)}, nil
}

// readStatic reads an executable that runs without any other file.
func readStatic(name string) ([]byte, elf.Machine, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, 0, err
	}
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, 0, fmt.Errorf("%s is not an executable: %w", name, err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, 0, fmt.Errorf("%s is linked dynamically: nothing it needs is in an initrd; build it with CGO_ENABLED=0", name)
		}
	}
	if f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN {
		return nil, 0, fmt.Errorf("%s is not an executable but %v", name, f.Type)
	}
	return data, f.Machine, nil
}

func (b *builder) modules() ([]cpio.Record, error) {
	if b.o.Modules == nil {
		return nil, nil
	}
	fsys, version := b.o.Modules, b.o.Version
	if _, err := fs.Stat(fsys, "kernel"); errors.Is(err, fs.ErrNotExist) {
		dir, found, err := FindModules(fsys, version)
		if err != nil {
			return nil, err
		}
		if fsys, err = fs.Sub(fsys, dir); err != nil {
			return nil, err
		}
		version = found
	}
	set, err := newModuleSet(fsys)
	if err != nil {
		return nil, err
	}
	names, strict := b.o.ModuleNames, true
	if names == nil {
		names, strict = DefaultModules(), false
	}
	var records []cpio.Record
	made := make(map[string]bool)
	list := func(file string, names []string, strict bool) ([]string, error) {
		modules, absent, err := set.take(names, strict)
		if err != nil {
			return nil, err
		}
		var order strings.Builder
		for _, m := range modules {
			name := path.Join("lib/modules", m.Path)
			for i := len("lib/modules/"); i < len(name); i++ {
				if dir := name[:i]; name[i] == '/' && !made[dir] {
					made[dir] = true
					records = append(records, cpio.Directory(dir, 0o755))
				}
			}
			records = append(records, cpio.StaticFile(name, string(m.Data), 0o644))
			b.report.Modules = append(b.report.Modules, m.Name)
			fmt.Fprintf(&order, "/%s\n", name)
		}
		if order.Len() > 0 {
			records = append(records, cpio.StaticFile(strings.TrimPrefix(file, "/"), order.String(), 0o644))
		}
		return absent, nil
	}
	b.report.Version = version
	if b.report.Absent, err = list(boot.ModulesFile, names, strict); err != nil {
		return nil, err
	}
	for _, kind := range rootFilesystems() {
		absent, err := list(boot.ModulesFile+"."+kind, []string{kind}, false)
		if err != nil {
			return nil, err
		}
		b.report.Absent = append(b.report.Absent, absent...)
	}
	absent, err := list(boot.LazyModulesFile, lazyModules(), false)
	if err != nil {
		return nil, err
	}
	b.report.Absent = append(b.report.Absent, absent...)
	return records, nil
}

func (b *builder) configuration() ([]cpio.Record, error) {
	config := b.o.Config
	if config.KernelRelease == "" {
		config.KernelRelease = b.report.Version
	}
	if err := config.Check(); err != nil {
		return nil, err
	}
	data, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		return nil, err
	}
	records := []cpio.Record{cpio.StaticFile(strings.TrimPrefix(boot.ConfigFile, "/"), string(data)+"\n", 0o600)}
	if len(b.o.CACerts) > 0 {
		if block, _ := pem.Decode(b.o.CACerts); block == nil || block.Type != "CERTIFICATE" {
			return nil, errors.New("the CA certificates are not PEM")
		}
		records = append(records, cpio.StaticFile(strings.TrimPrefix(boot.CAFile, "/"), string(b.o.CACerts), 0o644))
	}
	if len(b.o.Signers) > 0 {
		if _, err := keys.ParseAllowedSigners(b.o.Signers); err != nil {
			return nil, err
		}
		records = append(records, cpio.StaticFile(strings.TrimPrefix(boot.SignersFile, "/"), string(b.o.Signers), 0o644))
	}
	return records, nil
}

// LiveModules is the modules directory of the running kernel.
func LiveModules() (fsys fs.FS, version string, err error) {
	version, err = hostVersion()
	if err != nil {
		return nil, "", err
	}
	root := os.DirFS("/")
	dir, _, err := FindModules(root, version)
	if err != nil {
		return nil, "", err
	}
	fsys, err = fs.Sub(root, dir)
	return fsys, version, err
}
