package main

import (
	"context"
	"crypto/rsa"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/instar-image/instar/agent/capture"
	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/qcow2"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload/images"
)

// imported is what an import reads.
type imported struct {
	capture.ImportDisk
	arch     string
	mappings []chunked.Mapping
	close    func() error
}

func runImport(ctx context.Context, a *app, o *importOptions, source string) error {
	begun := time.Now()
	settings, err := a.imageOptions(ctx, &o.createImageOptions)
	if err != nil {
		return err
	}
	in, err := a.openImport(o, source)
	if err != nil {
		return err
	}
	defer in.close()
	if settings.Architecture == "" {
		settings.Architecture = in.arch
	}
	if settings.Architecture == "" {
		if settings.Architecture, err = a.arch(ctx, ""); err != nil {
			return err
		}
	}
	if len(settings.Mappings) == 0 {
		settings.Mappings = in.mappings
	}
	m := a.machineKeys(&o.imageStore, o.sign, true)
	objects, err := a.openImages(ctx, &o.imageStore, true)
	if err != nil {
		return err
	}
	defer objects.Close()
	if err := a.imageKeys(ctx, &o.createImageOptions, m, settings); err != nil {
		return err
	}
	store, err := images.Open(objects, images.Options{State: a.stateDir(), Trust: settings.Trust, Identities: settings.Identities})
	if err != nil {
		return err
	}
	r := &reporter{ui: a.ui}
	defer r.end()
	res, err := capture.ImportImage(ctx, capture.ImportOptions{
		Store: store, Name: settings.Name, Domain: settings.Domain, Owner: settings.Owner, Signer: settings.Signer, Recipients: settings.Recipients,
		AllCreators: settings.AllCreators, Expires: settings.Expires, Description: settings.Description, Level: settings.Level,
		Architecture: settings.Architecture, Mappings: settings.Mappings, Tool: settings.Tool,
	}, in.ImportDisk, r)
	r.end()
	if err != nil {
		return explainCapture(explain(err), m, settings.Domain)
	}
	return a.showImported(res, store.String(), time.Since(begun))
}

// showImported tells what was published.
func (a *app) showImported(r *capture.ImageResult, store string, took time.Duration) error {
	text := fmt.Sprintf("Image %s@%s is in %s\na disk of %s, %s of it data; %s added in %d packs and %d index objects, %s of data taken from what was stored; %.1f s",
		r.Manifest.Name, r.Published.Name.String()[:digits], store, ui.Size(r.Size), ui.Size(r.Manifest.Data), ui.Size(r.BytesAdded), r.PacksAdded, r.IndexAdded, ui.Size(r.BytesReused), took.Seconds())
	return a.ui.Result("image", text, ui.Fields{
		"store": store, "name": r.Manifest.Name, "manifest": r.Published.Name.String(), "sequence": r.Published.Sequence, "domain": r.Manifest.Domain,
		"architecture": r.Manifest.Architecture, "partition": r.Manifest.Partition, "filesystem": r.Manifest.Filesystem,
		"size": r.Size, "data": r.Manifest.Data, "bytes_read": r.BytesRead, "bytes_added": r.BytesAdded, "bytes_reused": r.BytesReused,
		"packs_added": r.PacksAdded, "index_added": r.IndexAdded, "seconds": took.Seconds(),
	})
}

// openImport finds out what SOURCE is.
func (a *app) openImport(o *importOptions, source string) (*imported, error) {
	if strings.HasSuffix(source, ".manifest.xml") {
		return a.importBundle(o, source)
	}
	if o.key != "" || o.source != "" {
		return nil, usagef("--privatekey and --source go with the manifest of a bundle, NAME.manifest.xml")
	}
	f, err := os.Open(source)
	if err != nil {
		return nil, failf(exitFile, "opening the disk: %w", err)
	}
	front := make([]byte, 4)
	if n, _ := f.ReadAt(front, 0); !qcow2.IsImage(front[:n]) {
		f.Close()
		return importRaw(source)
	}
	in, err := importQCOW2(f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", source, err)
	}
	return in, nil
}

func importRaw(source string) (*imported, error) {
	img, closeImage, err := capture.OpenImage(source, 0)
	if err != nil {
		return nil, err
	}
	return &imported{ImportDisk: capture.OfImage(img), close: closeImage}, nil
}

func importQCOW2(f *os.File) (*imported, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	q, err := qcow2.NewReader(f, size)
	if err != nil {
		return nil, err
	}
	m, err := q.Map()
	if err != nil {
		return nil, err
	}
	return &imported{ImportDisk: capture.ReadDisk(q, q.Size(), m), close: f.Close}, nil
}

func (a *app) importBundle(o *importOptions, manifest string) (*imported, error) {
	opts, err := a.opening(o.key, &o.trust)
	if err != nil {
		return nil, err
	}
	if o.source == "" {
		o.source = filepath.Dir(manifest)
	}
	if err := isDir(o.source, "--source"); err != nil {
		return nil, err
	}
	m, _, err := a.readManifest(manifest, func() (*rsa.PrivateKey, error) { return opts.Key, nil })
	if err != nil {
		return nil, explain(err)
	}
	in := &imported{close: func() error { return nil }}
	in.Size = m.Size
	in.Fill = func(ctx context.Context, out ec2.Output) error {
		return ec2.Unbundle(ctx, opts, m, dirSource(o.source), out)
	}
	switch m.Arch {
	case "x86_64", "arm64", "i386":
		in.arch = m.Arch
	}
	for _, b := range m.BlockDeviceMapping {
		in.mappings = append(in.mappings, chunked.Mapping{Virtual: b.Virtual, Device: b.Device})
	}
	return in, nil
}
