package main

import (
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/instar-image/instar/agent/capture"
	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog"
)

// transfer shows how a transfer goes.
type transfer struct {
	a    *app
	bar  *ui.Progress
	verb string
}

func (a *app) transfer(label, verb string) *transfer {
	return &transfer{a, a.ui.Progress(label, 0), verb}
}

func (t *transfer) Start(_ int, bytes int64) { t.bar.Total(bytes) }
func (t *transfer) Add(n int64)              { t.bar.Add(n) }
func (t *transfer) Done(key string, size int64, skipped bool) {
	if skipped {
		t.bar.Add(size)
		t.a.ui.Say("%s is there already", key)
		return
	}
	t.a.ui.Say("%s %s", t.verb, key)
}

func runUpload(ctx context.Context, a *app, o *uploadOptions) error {
	if err := need(o.manifest, "--manifest"); err != nil {
		return err
	}
	if err := need(a.setting("store", "--bucket", o.bucket), "--bucket"); err != nil {
		return err
	}
	if err := isFile(o.manifest, "--manifest"); err != nil {
		return err
	}
	if o.directory == "" {
		o.directory = filepath.Dir(o.manifest)
	}
	if err := isDir(o.directory, "--directory"); err != nil {
		return err
	}
	m, _, err := a.readManifest(o.manifest, nil)
	if err != nil {
		return err
	}
	if o.part > len(m.Parts) {
		return usagef("--part %d: the bundle has %d parts, counted from 0", o.part, len(m.Parts))
	}
	var files []upload.File
	for _, p := range m.Parts[o.part:] {
		f := upload.File{Key: p.Filename, Path: filepath.Join(o.directory, p.Filename)}
		if err := isFile(f.Path, "part of the bundle"); err != nil {
			return err
		}
		files = append(files, f)
	}
	store, err := a.openWritable(ctx, &o.storage)
	if err != nil {
		return err
	}
	defer store.Close()
	t := a.transfer("uploading "+m.Name, "uploaded")
	res, err := upload.Upload(ctx, store, files, upload.TransferOptions{Progress: t})
	t.bar.End()
	if err != nil {
		return withHint(asS3(err), "The same command goes on where this one stopped.")
	}
	name := filepath.Base(o.manifest)
	location := store.String() + "/" + name
	f := ui.Fields{"parts": len(m.Parts), "moved": res.Moved, "skipped": res.Skipped, "moved_bytes": res.MovedBytes, "location": location}
	if o.skipManifest {
		delete(f, "location")
		return a.ui.Result("upload", fmt.Sprintf("Uploaded %d parts, not the manifest", len(files)), f)
	}
	if _, err := upload.Upload(ctx, store, []upload.File{{Key: name, Path: o.manifest}}, upload.TransferOptions{
		Force: true, Put: upload.PutOptions{ContentType: "application/xml"},
	}); err != nil {
		return asS3(err)
	}
	human := "Bundle is " + location
	switch a.family {
	case familyEuca:
		human = "Uploaded " + strings.TrimPrefix(location, "s3://")
	case familyEC2:
		human = "Bundle upload completed."
	}
	return a.ui.Result("upload", human, f)
}

// openWritable opens the bucket, makes it if need be, and finds out whether
// it can be written, before any work is done.
func (a *app) openWritable(ctx context.Context, o *storage) (upload.Store, error) {
	bucket := a.setting("store", "--bucket", o.bucket)
	if err := need(bucket, "--bucket"); err != nil {
		return nil, err
	}
	return a.openWritableBucket(ctx, o, bucket)
}

func (a *app) openWritableBucket(ctx context.Context, o *storage, bucket string) (upload.Store, error) {
	said := o.acl != ""
	if !said {
		o.acl = string(upload.ACLAWSExecRead) // the peers' default
	}
	store, err := a.openBucket(ctx, o, bucket, true)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (upload.Store, error) { return nil, errors.Join(asS3(err), store.Close()) }
	location := a.setting("location", "--location", o.location)
	if location == "" && a.family == familyEC2 && a.storeRegion() != "us-east-1" && a.conf.Get("endpoint").Text == "" {
		location = a.storeRegion()
	}
	created, err := upload.EnsureBucket(ctx, store, location)
	switch {
	case errors.Is(err, upload.ErrAccess) && location == "":
		a.ui.Debug("the bucket's location is not told", ui.Fields{"error": err.Error()})
	case err != nil:
		return fail(err)
	case created:
		a.ui.Say("made the bucket %s", bucket)
	}
	w, err := upload.CheckWritable(ctx, store, upload.PutOptions{})
	if errors.Is(err, upload.ErrACL) && !said {
		// Nobody asked for the list: a server that refuses all of them is no reason to stop.
		store.Close()
		a.ui.Say("note: the bucket takes no access control lists: a bucket policy decides who may read")
		o.acl = ""
		if store, err = a.openBucket(ctx, o, bucket, true); err != nil {
			return nil, err
		}
		w, err = upload.CheckWritable(ctx, store, upload.PutOptions{})
	}
	if err != nil {
		return fail(err)
	}
	if w.ACLIgnored && said {
		a.ui.Warn(fmt.Sprintf("%s ignores --acl: a bucket policy decides who may read", w.Server), nil)
	}
	if w.NotDeleted != nil {
		a.ui.Say("note: the test object %s could not be removed again: %v", w.Key, w.NotDeleted)
	}
	return store, nil
}

// sourceManifest finds the manifest of a download: in the bucket or in a file.
func (a *app) sourceManifest(ctx context.Context, o *downloadOptions, store upload.Store) (m *ec2.Manifest, raw, plain []byte, name string, err error) {
	key := func() (*rsa.PrivateKey, error) { return a.privateKey(o.key) }
	if o.localManifest != "" {
		if o.manifest != "" || o.prefix != "" {
			return nil, nil, nil, "", usagef("--local-manifest excludes --manifest and --prefix")
		}
		m, plain, err = a.readManifest(o.localManifest, key)
		return m, nil, plain, "", err
	}
	if name, err = manifestName(o.manifest, o.prefix); err != nil {
		return nil, nil, nil, "", err
	}
	if raw, err = storedManifest(ctx, store, name); err != nil {
		return nil, nil, nil, "", err
	}
	if sum := sha256.Sum256(raw); o.digest != "" && hex.EncodeToString(sum[:]) != o.digest {
		return nil, nil, nil, "", withHint(failf(exitTrust, "%s/%s: the manifest has SHA-256 %x, and %s was registered", store, name, sum, o.digest),
			"Somebody changed the bundle after it was registered. If that was right, register it anew.")
	}
	if m, plain, err = parseManifest(raw, key); err != nil {
		err = fmt.Errorf("%s/%s: %w", store, name, err)
	}
	return m, raw, plain, name, err
}

func runDownload(ctx context.Context, a *app, o *downloadOptions) error {
	store, err := a.openStore(ctx, &o.storage)
	if err != nil {
		return err
	}
	defer store.Close()
	dir := o.directory
	if dir == "" {
		dir = "."
	}
	if dir != "-" {
		if err := isDir(dir, "--directory"); err != nil {
			return err
		}
	}
	m, raw, plain, name, err := a.sourceManifest(ctx, o, store)
	if err != nil {
		return explain(err)
	}
	if dir == "-" {
		return a.downloadStream(ctx, store, m)
	}
	var fetches []upload.Fetch
	for _, p := range m.Parts {
		fetches = append(fetches, upload.Fetch{Key: p.Filename, Name: p.Filename, Sum: p.SHA1[:], Hash: ec2.NewSum})
	}
	t := a.transfer("downloading "+m.Name, "downloaded")
	t.bar.Total(m.BundledSize)
	res, err := upload.Download(ctx, store, dir, fetches, upload.TransferOptions{Progress: t})
	t.bar.End()
	if err != nil {
		if errors.Is(err, upload.ErrCorrupt) {
			return &exitError{code: exitTrust, err: err}
		}
		return withHint(asS3(err), "The same command goes on where this one stopped.")
	}
	f := ui.Fields{"parts": len(m.Parts), "moved": res.Moved, "skipped": res.Skipped, "moved_bytes": res.MovedBytes}
	human := fmt.Sprintf("Downloaded %d parts to %s", len(m.Parts), dir)
	if raw != nil {
		path := filepath.Join(dir, filepath.Base(name))
		if err := a.keepManifest(path, raw); err != nil {
			return err
		}
		if len(plain) != len(raw) {
			if err := a.keepManifest(path+".plaintext", plain); err != nil {
				return err
			}
			f["plaintext"] = path + ".plaintext"
		}
		f["manifest"] = path
		human = "Bundle manifest is " + path
		if a.family == familyEuca {
			human = "Wrote " + path
		}
	}
	return a.ui.Result("download", human, f)
}

// downloadStream writes the parts to standard output one after the other, each
// of them verified before.
func (a *app) downloadStream(ctx context.Context, store upload.Store, m *ec2.Manifest) error {
	bar := a.ui.Progress("downloading "+m.Name, m.BundledSize)
	defer bar.End()
	for _, p := range m.Parts {
		data, _, err := upload.GetBytes(ctx, store, p.Filename, ec2.MaxPartSize)
		if err != nil {
			return asS3(err)
		}
		if ec2.Sum(data) != p.SHA1 {
			return failf(exitTrust, "part %q: its digest is not that of the manifest", p.Filename)
		}
		if _, err := a.stdout.Write(data); err != nil {
			return fmt.Errorf("writing to standard output: %w", err)
		}
		bar.Add(int64(len(data)))
	}
	return nil
}

func runDownloadAndUnbundle(ctx context.Context, a *app, o *downloadOptions) error {
	opts, err := a.opening(o.key, &o.trust)
	if err != nil {
		return err
	}
	store, err := a.openStore(ctx, &o.storage)
	if err != nil {
		return err
	}
	defer store.Close()
	m, _, _, _, err := a.sourceManifest(ctx, o, store)
	if err != nil {
		return explain(err)
	}
	path := o.directory
	if path == "" {
		path = "."
	}
	if path != "-" && isDir(path, "") == nil {
		path = filepath.Join(path, m.Name)
	}
	return a.unbundleTo(ctx, opts, m, storeSource{store}, path)
}

func runDelete(ctx context.Context, a *app, o *deleteOptions) error {
	store, err := a.openStore(ctx, &o.storage)
	if err != nil {
		return err
	}
	defer store.Close()
	name, bundle, parts, err := a.doomed(ctx, o, store)
	if err != nil {
		return err
	}
	stored, err := capture.StoredParts(ctx, store, bundle)
	if err != nil {
		return asS3(err)
	}
	for _, k := range stored {
		if !slices.Contains(parts, k) {
			parts = append(parts, k)
		}
	}
	keys := append([]string{name}, slices.DeleteFunc(parts, func(k string) bool { return k == name })...)
	if !o.yes && a.family != familyEuca {
		for _, k := range keys {
			a.ui.Say("  %s/%s", store, k)
		}
		ok, err := a.confirm(ctx, fmt.Sprintf("Remove these %d objects?", len(keys)))
		if err != nil {
			return err
		}
		if !ok {
			return failf(exitPrompt, "nothing was removed")
		}
	}
	release, err := a.claimBundle(ctx, &o.storage, store, name)
	if err != nil {
		return errors.Join(err, release())
	}
	claimed, stop := context.WithTimeout(ctx, catalog.ClaimLife) // after that others may register what is left
	err = a.remove(claimed, o, store, keys)
	stop()
	if err := errors.Join(err, release()); err != nil {
		return err
	}
	f := ui.Fields{"removed": keys, "bucket_removed": false}
	if o.clear {
		m, ok := store.(upload.BucketManager)
		if !ok {
			return failf(exitUsage, "--clear: a directory is not removed; use rmdir %s", store)
		}
		err := m.DeleteBucket(ctx)
		switch {
		case errors.Is(err, upload.ErrNotEmpty):
			a.ui.Warn(fmt.Sprintf("the bucket %s holds other objects: it stays", m.Bucket()), nil)
		case err != nil:
			return asS3(err)
		default:
			f["bucket_removed"] = true
		}
	}
	human := fmt.Sprintf("Removed %d objects of %s", len(keys), bundle)
	if a.family == familyEC2 {
		human = a.tool + " complete."
	}
	return a.ui.Result("delete", human, f)
}

// doomed is what delete-bundle is to remove: the manifest's name, the bundle's
// and the parts the manifest names.
func (a *app) doomed(ctx context.Context, o *deleteOptions, store upload.Store) (name, bundle string, parts []string, err error) {
	if o.manifest == "" && o.prefix == "" && o.localManifest == "" {
		return "", "", nil, usagef("missing option --manifest or --prefix")
	}
	file := o.localManifest
	if file == "" && o.manifest != "" && (a.family == familyEC2 || a.family == familyInstar && isFile(o.manifest, "") == nil) {
		file = o.manifest
	}
	var m *ec2.Manifest
	switch {
	case file != "":
		name = filepath.Base(file)
		m, _, err = a.readManifest(file, func() (*rsa.PrivateKey, error) { return a.privateKey("") })
	default:
		if name, err = manifestName(o.manifest, o.prefix); err != nil {
			return "", "", nil, err
		}
		var data []byte
		data, err = storedManifest(ctx, store, name)
		if err == nil {
			m, _, err = parseManifest(data, nil)
		}
		bundle = strings.TrimSuffix(name, ".manifest.xml")
		// Without a manifest that can be read, what is called like its parts
		// is still to be removed: an upload may have been interrupted.
		switch {
		case errors.Is(err, upload.ErrNotExist):
			left, lerr := capture.StoredParts(ctx, store, bundle)
			if lerr == nil && o.versions {
				left, lerr = oldVersions(ctx, store, name, bundle)
			}
			if lerr != nil || len(left) == 0 {
				return "", "", nil, err
			}
			parts, err = left, nil
		case err != nil && libraryCode(err) != exitS3:
			a.ui.Warn(fmt.Sprintf("%s cannot be read, removing what is called like its parts: %v", name, err), nil)
			err = nil
		}
	}
	if err != nil {
		return "", "", nil, err
	}
	if m != nil {
		bundle = m.Name
		for _, p := range m.Parts {
			parts = append(parts, p.Filename)
		}
	}
	return name, bundle, parts, nil
}

// oldVersions are the objects of a bundle of which some version is kept.
func oldVersions(ctx context.Context, store upload.Store, manifest, bundle string) ([]string, error) {
	v, ok := store.(upload.Versioner)
	if !ok {
		return nil, nil
	}
	var keys []string
	for ver, err := range v.Versions(ctx, bundle+".") {
		if err != nil {
			return nil, asS3(err)
		}
		if (ver.Key == manifest || capture.IsPart(ver.Key, bundle)) && !slices.Contains(keys, ver.Key) {
			keys = append(keys, ver.Key)
		}
	}
	return keys, nil
}

// remove deletes objects, the manifest before all others, and deals with the
// versions a bucket keeps.
func (a *app) remove(ctx context.Context, o *deleteOptions, store upload.Store, keys []string) error {
	v, versioned := store.(upload.Versioner)
	if versioned && o.versions {
		var doomed []upload.Version
		for _, k := range keys {
			for ver, err := range v.Versions(ctx, k) {
				if err != nil {
					return asS3(err)
				}
				if ver.Key == k {
					doomed = append(doomed, ver)
				}
			}
		}
		if err := v.DeleteVersions(ctx, doomed...); err != nil {
			return asS3(err)
		}
		return nil
	}
	if err := store.Delete(ctx, keys[0]); err != nil {
		return asS3(err)
	}
	if err := store.Delete(ctx, keys[1:]...); err != nil {
		return asS3(err)
	}
	if versioned {
		for ver, err := range v.Versions(ctx, keys[0]) {
			if err != nil {
				a.ui.Debug("versions", ui.Fields{"error": err.Error()})
				break
			}
			if ver.Key == keys[0] && !ver.Marker {
				a.ui.Say("note: the bucket keeps old versions: they still take space; --all-versions removes them")
				break
			}
		}
	}
	return nil
}
