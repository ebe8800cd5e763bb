package main

import (
	"context"
	"crypto/rsa"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/instar-image/instar/agent/capture"
	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/sparse"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/internal/durable"
)

// readManifest reads and parses a manifest in a file.
func (a *app) readManifest(path string, key func() (*rsa.PrivateKey, error)) (*ec2.Manifest, []byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, failf(exitFile, "reading the manifest: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxManifest+1))
	if err != nil {
		return nil, nil, fmt.Errorf("reading the manifest: %w", err)
	}
	m, data, err := parseManifest(data, key)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	return m, data, nil
}

// parseManifest parses a manifest; one of the old kind that is encrypted as a
// whole is decrypted with the key first.
func parseManifest(data []byte, key func() (*rsa.PrivateKey, error)) (*ec2.Manifest, []byte, error) {
	if ec2.IsEncryptedManifest(data) && key != nil {
		k, err := key()
		if err != nil {
			return nil, nil, err
		}
		if data, err = ec2.DecryptManifest(data, k); err != nil {
			return nil, nil, err
		}
	}
	m, err := ec2.ParseManifest(data)
	return m, data, err
}

// opening are the options to open a bundle with the user's or the cloud's key.
func (a *app) opening(keyPath string, t *trust) (ec2.UnbundleOptions, error) {
	key, err := a.privateKey(keyPath)
	if err != nil {
		return ec2.UnbundleOptions{}, err
	}
	signers, err := a.trusted(t, key)
	return ec2.UnbundleOptions{Key: key, Trust: signers, AllowUnsigned: t.allowUnsigned, SpoolDir: a.tempDir()}, err
}

// explain adds what to do about a bundle that is not believed.
func explain(err error) error {
	switch {
	case errors.Is(err, ec2.ErrUnsigned):
		return withHint(err, "--allow-unsigned opens it all the same.")
	case errors.Is(err, ec2.ErrSignature):
		return withHint(err, "Give the signer's certificate with --cert or --trust if it is not the holder of the key.")
	}
	return err
}

func runUnbundle(ctx context.Context, a *app, o *unbundleOptions) error {
	if err := need(o.manifest, "--manifest"); err != nil {
		return err
	}
	opts, err := a.opening(o.key, &o.trust)
	if err != nil {
		return err
	}
	for _, d := range []struct {
		dir    *string
		option string
	}{{&o.source, "--source"}, {&o.destination, "--destination"}} {
		if *d.dir == "" {
			*d.dir = "."
		}
		if err := isDir(*d.dir, d.option); err != nil {
			return err
		}
	}
	m, _, err := a.readManifest(o.manifest, func() (*rsa.PrivateKey, error) { return opts.Key, nil })
	if err != nil {
		return explain(err)
	}
	return a.unbundleTo(ctx, opts, m, dirSource(o.source), filepath.Join(o.destination, m.Name))
}

// countedSource counts what is read of parts.
type countedSource struct {
	ec2.PartSource
	bar *ui.Progress
}

// OpenPart opens a part of the source.
func (s countedSource) OpenPart(ctx context.Context, name string) (io.ReadCloser, error) {
	r, err := s.PartSource.OpenPart(ctx, name)
	if err != nil {
		return nil, err
	}
	return countedReader{r, s.bar}, nil
}

type countedReader struct {
	io.ReadCloser
	bar *ui.Progress
}

func (r countedReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.bar.Add(int64(n))
	return n, err
}

// unbundleTo writes the image to a file, a block device or, for "-", to
// standard output.
func (a *app) unbundleTo(ctx context.Context, opts ec2.UnbundleOptions, m *ec2.Manifest, src ec2.PartSource, path string) error {
	total := m.BundledSize
	device := false
	if st, err := os.Stat(path); err == nil {
		device = st.Mode()&os.ModeDevice != 0 && st.Mode()&os.ModeCharDevice == 0
	}
	if path == "-" || device {
		total *= 2 // everything is read twice: once to verify
	}
	bar := a.ui.Progress("opening "+m.Name, total)
	src = countedSource{src, bar}
	var err error
	switch {
	case path == "-":
		err = ec2.UnbundleTo(ctx, opts, m, src, a.stdout)
	case device:
		err = unbundleDevice(ctx, opts, m, src, path)
	default:
		err = ec2.UnbundleFile(ctx, opts, m, src, path)
	}
	bar.End()
	if err != nil {
		return explain(err)
	}
	if path == "-" {
		return nil
	}
	human := fmt.Sprintf("Image is %s", path)
	switch a.family {
	case familyEuca:
		human = "Wrote " + path
	case familyEC2:
		human = fmt.Sprintf("Unbundle complete.\n%s complete.", a.tool)
	}
	return a.ui.Result("image", human, ui.Fields{"path": path, "name": m.Name, "size": m.Size})
}

func unbundleDevice(ctx context.Context, opts ec2.UnbundleOptions, m *ec2.Manifest, src ec2.PartSource, path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_EXCL, 0)
	if err != nil {
		return fmt.Errorf("opening the device: %w", err)
	}
	return errors.Join(ec2.UnbundleDevice(ctx, opts, m, src, f), f.Close())
}

func runUnbundleStream(ctx context.Context, a *app, o *streamOptions) (err error) {
	if err := need(o.key, "--enc-key"); err != nil {
		return err
	}
	if err := need(o.iv, "--enc-iv"); err != nil {
		return err
	}
	opts := ec2.StreamOptions{Size: o.size}
	if opts.Key, err = ec2.ParseBlockKey(o.key); err != nil {
		return fmt.Errorf("--enc-key: %w", err)
	}
	if opts.IV, err = ec2.ParseBlockKey(o.iv); err != nil {
		return fmt.Errorf("--enc-iv: %w", err)
	}
	if o.digest != "" {
		sum, err := hex.DecodeString(o.digest)
		if err != nil || len(sum) != len(ec2.SHA1{}) {
			return usagef("--sha1-digest %q: 40 hex digits are needed", o.digest)
		}
		opts.SHA1 = (*ec2.SHA1)(sum)
	}
	in := a.stdin
	if o.in != "" && o.in != "-" {
		f, err := os.Open(o.in)
		if err != nil {
			return failf(exitFile, "opening the input: %w", err)
		}
		defer f.Close()
		in = f
	}
	if o.digest == "" && o.size == 0 {
		a.ui.Warn("neither --image-size nor --sha1-digest is given: a damaged stream can pass", nil)
	}
	bar := a.ui.Progress("opening the stream", 0)
	defer bar.End()
	in = countedReader{io.NopCloser(capture.Interruptible(ctx, in)), bar}
	if o.out == "" || o.out == "-" {
		return ec2.UnbundleStream(ctx, opts, in, ec2.NewStreamOutput(a.stdout))
	}
	return durable.Fill(o.out, 0o600, func(f *os.File) error { return ec2.UnbundleStream(ctx, opts, in, sparse.NewWriter(f)) })
}

func runVerify(ctx context.Context, a *app, o *verifyOptions) error {
	var opts ec2.VerifyOptions
	var err error
	if o.key != "" || a.conf.Get("private_key").Text != "" {
		if opts.Key, err = a.privateKey(o.key); err != nil {
			return err
		}
	}
	if opts.Trust, err = a.trusted(&o.trust, opts.Key); err != nil {
		return err
	}
	opts.AllowUnsigned, opts.SpoolDir = o.allowUnsigned, a.tempDir()
	if opts.Key == nil && len(opts.Trust) == 0 && !o.allowUnsigned {
		return withHint(usagef("nobody is trusted"), "Say whose signature to accept: --cert PEM or --trust FILE, or -k KEY for one's own.")
	}
	key := func() (*rsa.PrivateKey, error) { return a.privateKey(o.key) }
	var m *ec2.Manifest
	var src ec2.PartSource
	if o.bucket != "" || o.manifest == "" && a.conf.Get("store").Text != "" {
		store, err := a.openStore(ctx, &o.storage)
		if err != nil {
			return err
		}
		defer store.Close()
		name, err := manifestName(o.manifest, o.prefix)
		if err != nil {
			return err
		}
		data, err := storedManifest(ctx, store, name)
		if err != nil {
			return err
		}
		if m, _, err = parseManifest(data, key); err != nil {
			return explain(fmt.Errorf("%s/%s: %w", store, name, err))
		}
		src = storeSource{store}
	} else {
		if err := need(o.manifest, "--manifest"); err != nil {
			return err
		}
		if m, _, err = a.readManifest(o.manifest, key); err != nil {
			return explain(err)
		}
		if o.source == "" {
			o.source = filepath.Dir(o.manifest)
		}
		src = dirSource(o.source)
	}
	bar := a.ui.Progress("checking "+m.Name, m.BundledSize)
	rep, err := ec2.Verify(ctx, opts, m, countedSource{src, bar})
	bar.End()
	if rep == nil {
		return explain(err)
	}
	if perr := a.showReport(rep); perr != nil {
		return perr
	}
	if err != nil && !rep.OK() {
		// what is wrong is in the report already, object by object
		n, hint := len(rep.Problems), ""
		if rep.Signature == "bad" {
			hint = "Give the signer's certificate with --cert or --trust if it is another one."
		}
		return &exitError{code: exitTrust, err: fmt.Errorf("the bundle %s is not good: %d of its objects, as reported", rep.Name, n), hint: hint}
	}
	return err
}

func (a *app) showReport(rep *ec2.Report) error {
	human := fmt.Sprintf("bundle     %s, %s, %s, account %s, %s\nsignature  %s", rep.Name, rep.Type, rep.Arch, rep.Account, ui.Size(rep.Size), rep.Signature)
	if rep.Signer != "" {
		human += " (key " + rep.Signer[:min(16, len(rep.Signer))] + "...)"
	}
	human += fmt.Sprintf("\nparts      %d of %d good, %s\narchive    %s\nunsigned   version %q, bundler %q (for display only)",
		rep.PartsGood, rep.Parts, ui.Size(rep.PartBytes), rep.Archive, rep.Unsigned.Version, rep.Unsigned.Bundler)
	for _, p := range rep.Problems {
		human += "\nproblem    " + p.Text
	}
	return a.ui.Result("report", human, ui.Fields{"report": rep, "ok": rep.OK()})
}

// manifestName is the manifest's name in a bucket.
func manifestName(manifest, prefix string) (string, error) {
	switch {
	case manifest != "" && prefix != "":
		return "", usagef("--manifest and --prefix exclude each other")
	case manifest != "":
		return manifest, nil
	case prefix != "":
		return prefix + ".manifest.xml", nil
	default:
		return "image.manifest.xml", nil
	}
}
