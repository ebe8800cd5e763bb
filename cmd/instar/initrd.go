package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/spf13/cobra"

	"github.com/instar-image/instar/cmd/instar/internal/initbin"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/initrd"
	"github.com/instar-image/instar/initrd/boot"
	"github.com/instar-image/instar/internal/durable"
)

func newInitrd(a *app) *cobra.Command {
	cmd := branch("initrd", "build the initrd that boots images", `
The initrd boots a machine from an image: network, instance metadata, the root,
SSH keys and user data, and then the image's own system. docs/initrd.md lists
its kernel parameters.`, "  instar initrd build -o instar.initrd")
	cmd.AddCommand(newInitrdBuild(a))
	return cmd
}

type initrdOptions struct {
	output, modules, release, init, shell, compression, caCert, signers string
	noModules                                                           bool
	names, params                                                       []string
}

func newInitrdBuild(a *app) *cobra.Command {
	var o initrdOptions
	const test = "initrd-build"
	cmd := a.command("build", "pack an initrd", `
Packs an initrd: a static init, kernel modules with what they depend on, and a
configuration. The same input gives the same bytes. Neither a compiler nor any
other program is needed.

The modules are those of the running kernel unless --modules names another
directory: lib/modules/RELEASE itself, or a root directory such as a captured
one. The init is built into instar; --init names another, such as that of
another architecture.`, `
  instar initrd build -o instar.initrd
  instar initrd build -o web.initrd --modules /mnt/root --param net=static --param address=192.0.2.7/24
  instar initrd build -o arm.initrd --init instar-init-arm64 --modules ./arm-root`,
		func(ctx context.Context) error { return runInitrdBuild(ctx, a, &o) })
	f := flagsOf(cmd)
	f.text(&o.output, "output", "o", "write `FILE`", ofUs, test)
	completeFiles(cmd, "output")
	f.text(&o.modules, "modules", "", "take the modules from `DIR`; default those of the running kernel", ofUs, test)
	completeFiles(cmd, "modules")
	f.text(&o.release, "release", "", "of several kernels in --modules, that of `RELEASE`", ofUs, test)
	f.yes(&o.noModules, "no-modules", "", "no modules: the kernel has all built in", ofUs, test)
	f.list(&o.names, "module", "", "take the module `NAME` instead of the usual ones, with what it depends on; may be repeated", ofUs, test)
	f.text(&o.init, "init", "", "the init is `FILE`, a static instar-init", ofUs, test)
	completeFiles(cmd, "init")
	f.list(&o.params, "param", "", "build in the kernel parameter instar.`NAME=VALUE`; may be repeated", ofUs, test)
	f.text(&o.caCert, "ca-cert", "", "trust the certificates in `PEM` for a metadata server by https", ofUs, test)
	completeFiles(cmd, "ca-cert", "pem")
	f.text(&o.signers, "allowed-signers", "", "start Instar images only of the signers in `FILE`, whatever a ticket says", ofUs, test)
	completeFiles(cmd, "allowed-signers")
	f.text(&o.shell, "shell", "", "pack the static shell `FILE` and allow instar.fail=shell: who may edit kernel parameters then owns the machine", ofUs, test)
	completeFiles(cmd, "shell")
	f.choice(cmd, &o.compression, []string{"zstd", "gzip", "none"}, "compression", "", "`KIND` of compression: zstd (default; Linux 5.9 and later), gzip, none", ofUs, test)
	return cmd
}

func runInitrdBuild(ctx context.Context, a *app, o *initrdOptions) error {
	if err := need(o.output, "--output"); err != nil {
		return err
	}
	opts, err := a.initrdOptions(o)
	if err != nil {
		return err
	}
	if opts.Init == "" {
		init, done, err := findInit()
		if err != nil {
			return err
		}
		defer done()
		opts.Init = init
	}
	report, err := writeInitrd(ctx, opts, o.output)
	if err != nil {
		return err
	}
	for _, p := range report.Parts {
		a.ui.Say("%-14s %4d files %9d bytes, %8d in the initrd", p.Name, p.Files, p.Bytes, p.Stored)
	}
	return a.ui.Result("initrd", fmt.Sprintf("%s: %d bytes, %d modules", o.output, report.Stored, len(report.Modules)), ui.Fields{
		"file": o.output, "bytes": report.Stored, "modules": report.Modules, "release": report.Version, "parts": report.Parts,
	})
}

// initrdOptions makes of the command line what Build takes.
func (a *app) initrdOptions(o *initrdOptions) (initrd.Options, error) {
	opts := initrd.Options{
		Init: o.init, Version: o.release, ModuleNames: o.names, Shell: o.shell, Compression: initrd.Compression(o.compression),
		Config: boot.Config{AllowShell: o.shell != ""},
	}
	for _, p := range o.params {
		if strings.ContainsAny(p, " \"") {
			p = `"` + p + `"`
		}
		if err := opts.Config.Parameters("instar." + strings.TrimPrefix(p, "instar.")); err != nil {
			return opts, usagef("--param: %w", err)
		}
	}
	if err := opts.Config.Check(); err != nil {
		return opts, usagef("--param: %w", err)
	}
	if o.caCert != "" {
		var err error
		if opts.CACerts, err = os.ReadFile(o.caCert); err != nil {
			return opts, failf(exitFile, "reading the CA certificates: %w", err)
		}
	}
	if o.signers != "" {
		var err error
		if opts.Signers, err = os.ReadFile(o.signers); err != nil {
			return opts, failf(exitFile, "reading the allowed signers: %w", err)
		}
	}
	switch {
	case o.noModules:
		if o.modules != "" || len(o.names) > 0 {
			return opts, usagef("--no-modules excludes --modules and --module")
		}
	case o.modules != "":
		if err := isDir(o.modules, "--modules"); err != nil {
			return opts, err
		}
		opts.Modules = os.DirFS(o.modules)
	default:
		var err error
		if opts.Modules, opts.Version, err = initrd.LiveModules(); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return opts, withHint(err, "--modules names a directory with modules, --no-modules goes without.")
			}
			return opts, err
		}
	}
	return opts, nil
}

// findInit finds instar-init: within this program, beside it, or where
// packages put it. done is to be called when the path is needed no more.
func findInit() (path string, done func(), err error) {
	done = func() {}
	f, path, err := initbin.File()
	if err == nil {
		return path, func() { f.Close() }, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", done, err
	}
	self, err := os.Executable()
	if err != nil {
		return "", done, err
	}
	dir := filepath.Dir(self)
	for _, name := range []string{
		filepath.Join(dir, "instar-init"), filepath.Join(dir, "instar-init-"+runtime.GOARCH),
		filepath.Join(dir, "..", "lib", "instar", "instar-init"), "/usr/lib/instar/instar-init",
	} {
		if st, err := os.Stat(name); err == nil && st.Mode().IsRegular() {
			return name, done, nil
		}
	}
	return "", done, withHint(failf(exitFile, "this instar was built without instar-init, and none is beside %s or in /usr/lib/instar", self),
		"\"make build\" builds it in; --init names one.")
}

// writeInitrd writes an initrd to a file, which appears when it is whole.
func writeInitrd(ctx context.Context, opts initrd.Options, name string) (report *initrd.Report, err error) {
	err = durable.Fill(name, 0o644, func(f *os.File) error {
		report, err = initrd.Build(ctx, opts, f)
		return err
	})
	if err != nil {
		return nil, err
	}
	return report, nil
}
