package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"strings"

	"github.com/instar-image/instar/upload/catalog"
)

func runImagesCopy(ctx context.Context, a *app, o *copyOptions, ref string) (err error) {
	if err := need(o.to, "--to"); err != nil {
		return err
	}
	k, err := a.openCatalog(ctx, &o.imageStore, o.sign, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	v, err := k.View(ctx)
	if err != nil {
		return explainCatalog(err)
	}
	call, err := a.call(o.account, k.signer)
	if err != nil {
		return err
	}
	m, err := findImage(ctx, v, call.Account, ref)
	if err != nil {
		return err
	}
	there, err := a.otherRegion(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, there.close()) }()
	if _, err := there.View(ctx); err != nil {
		return explainCatalog(err)
	}
	if r := there.Region(); o.toRegion != "" && r != o.toRegion {
		return failf(exitUsage, "--to-region %s: the catalog of %s is of region %s", o.toRegion, there.Catalog, r)
	}
	token := o.token
	if token == "" {
		token = copyToken(v.Region(), m.ID, there.Region(), o.name)
	}
	n, err := there.Copy(ctx, call, catalog.CopyRequest{
		Name: o.name, Description: o.description, SourceID: m.ID, SourceRegion: v.Region(), Token: token, CopyTags: o.copyTags, Folder: o.folder,
	}, k.Catalog)
	if err != nil {
		return explainCatalog(err)
	}
	if n.State == catalog.Pending {
		a.ui.Say("%s in %s is pending: copying", n.ID, there.Region())
	}
	bar := a.progress("copying " + m.ID)
	n, err = there.CompleteCopy(ctx, call, n.ID, k.Catalog, bar.to)
	bar.end()
	if err != nil {
		return explainCatalog(err)
	}
	f := recordFields(n)
	f["region"] = there.Region()
	return a.ui.Result("copied", n.ID, f)
}

// otherRegion opens the catalog that is copied to: the same options, but for
// those that begin with --to.
func (a *app) otherRegion(ctx context.Context, o *copyOptions) (*openedCatalog, error) {
	b := *a
	b.conf = a.conf.Clone()
	st := o.imageStore
	st.bucket = o.to
	for _, s := range []struct {
		option *string
		value  string
	}{{&st.url, o.toURL}, {&st.caCert, o.toCACert}} {
		if s.value != "" {
			*s.option = s.value
		}
	}
	if o.toAccessKey != "" || o.toSecretFile != "" {
		st.accessKey, st.secretKeyFile = o.toAccessKey, o.toSecretFile
	}
	return b.openCatalog(ctx, &st, o.sign, true)
}

// copyToken is the same for the same copy.
func copyToken(words ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(words, "\x00")))
	return "copy-" + hex.EncodeToString(sum[:16])
}
