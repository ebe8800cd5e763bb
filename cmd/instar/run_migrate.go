package main

import (
	"bytes"
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/internal/durable"
	"github.com/instar-image/instar/upload"
)

// migrated reads the keys and makes the new manifest of an old one.
func (a *app) migrated(o *migrateOptions, m *ec2.Manifest, key *rsa.PrivateKey) (*ec2.Manifest, []byte, error) {
	cert, err := keys.ReadCertificate(a.conf.Get("certificate").Text)
	if err != nil {
		return nil, nil, err
	}
	signer, err := keys.PublicKey(cert)
	if err != nil {
		return nil, nil, err
	}
	opts := ec2.MigrateOptions{Trust: []*rsa.PublicKey{signer}, Key: key, KernelID: o.kernel, RamdiskID: o.ramdisk}
	if o.ec2Cert != "" {
		if opts.EC2Cert, err = keys.ReadCertificate(o.ec2Cert); err != nil {
			return nil, nil, err
		}
	}
	if !o.noMapping {
		where := ""
		if r := a.storeRegion(); r != "" {
			where = " in " + r
		}
		for _, x := range []struct{ old, given, name string }{{m.KernelID, o.kernel, "kernel"}, {m.RamdiskID, o.ramdisk, "ramdisk"}} {
			if x.old != "" && x.given == "" {
				return nil, nil, withHint(failf(exitMapping, "the manifest has the %s %s, whose counterpart%s is not known", x.name, x.old, where),
					"Give it with --%s ID, or --no-mapping to have none.", x.name)
			}
		}
	}
	next, doc, err := ec2.Migrate(m, opts)
	return next, doc, explain(err)
}

// migrationKey checks the options both commands need.
func (a *app) migrationKey(o *migrateOptions) (*rsa.PrivateKey, error) {
	for _, x := range []struct{ value, option string }{
		{a.setting("certificate", "--cert", o.cert), "--cert"}, {a.setting("private_key", "--privatekey", o.key), "--privatekey"}, {o.manifest, "--manifest"},
	} {
		if err := need(x.value, x.option); err != nil {
			return nil, err
		}
	}
	return a.privateKey(o.key)
}

func runMigrateManifest(_ context.Context, a *app, o *migrateOptions) error {
	key, err := a.migrationKey(o)
	if err != nil {
		return err
	}
	m, old, err := a.readManifest(o.manifest, func() (*rsa.PrivateKey, error) { return key, nil })
	if err != nil {
		return err
	}
	backup := o.manifest + ".bak"
	// One equal to the manifest is of a run that was killed halfway.
	if kept, err := os.ReadFile(backup); err == nil && !bytes.Equal(kept, old) || err != nil && !errors.Is(err, fs.ErrNotExist) {
		return failf(exitFile, "%s: %w: it would be overwritten", backup, fs.ErrExist)
	}
	next, doc, err := a.migrated(o, m, key)
	if err != nil {
		return err
	}
	if err := a.keepManifest(backup, old); err != nil {
		return err
	}
	if err := a.keepManifest(o.manifest, doc); err != nil {
		return err
	}
	human := "Migrated " + o.manifest
	if a.family == familyEC2 {
		human = "Successfully migrated " + o.manifest + "\nIt is now suitable for use in " + orElse(a.storeRegion(), "the other region") + "."
	}
	return a.ui.Result("migrate", human, ui.Fields{"manifest": o.manifest, "backup": backup, "kernel_id": next.KernelID, "ramdisk_id": next.RamdiskID})
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

// keepManifest writes a small file that appears complete or not at all.
func (a *app) keepManifest(path string, data []byte) error {
	err := durable.Fill(path, 0o600, func(f *os.File) error {
		_, err := f.Write(data)
		return errors.Join(err, f.Chmod(0o644))
	})
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

func runMigrateBundle(ctx context.Context, a *app, o *migrateOptions) error {
	key, err := a.migrationKey(o)
	if err != nil {
		return err
	}
	if err := need(o.destination, "--destination-bucket"); err != nil {
		return err
	}
	from, err := a.openStore(ctx, &o.storage)
	if err != nil {
		return err
	}
	defer from.Close()
	name := path.Base(filepath.ToSlash(o.manifest))
	data, err := storedManifest(ctx, from, o.manifest)
	if err != nil {
		return err
	}
	m, _, err := parseManifest(data, func() (*rsa.PrivateKey, error) { return key, nil })
	if err != nil {
		return explain(fmt.Errorf("%s/%s: %w", from, o.manifest, err))
	}
	next, doc, err := a.migrated(o, m, key)
	if err != nil {
		return err
	}
	to, err := a.openWritableBucket(ctx, &o.storage, o.destination)
	if err != nil {
		return err
	}
	defer to.Close()
	if from.String() == to.String() {
		return usagef("--bucket and --destination-bucket are the same: use migrate-manifest")
	}
	bar := a.ui.Progress("copying "+m.Name, m.BundledSize)
	defer bar.End()
	for i, p := range m.Parts {
		obj, err := upload.Copy(ctx, to, p.Filename, from, p.Filename, upload.PutOptions{})
		if err != nil {
			return a.undo(ctx, to, m.Parts[:i+1], err)
		}
		bar.Add(obj.Size)
	}
	if _, err := upload.PutBytes(ctx, to, name, doc, upload.PutOptions{ContentType: "application/xml"}); err != nil {
		return a.undo(ctx, to, m.Parts, err)
	}
	location := to.String() + "/" + name
	human := "Bundle is " + location
	if a.family == familyEC2 {
		human = "Your new bundle is in S3 at the following location: " + location
	}
	return a.ui.Result("migrate", human, ui.Fields{"location": location, "kernel_id": next.KernelID, "ramdisk_id": next.RamdiskID, "parts": len(m.Parts)})
}

// undo removes the parts of a copy that failed.
func (a *app) undo(ctx context.Context, s upload.Store, parts []ec2.ManifestPart, cause error) error {
	clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	defer cancel()
	keys := make([]string, len(parts))
	for i, p := range parts {
		keys[i] = p.Filename
	}
	return errors.Join(asS3(cause), s.Delete(clean, keys...))
}
