package main

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"

	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/bundle/keys"
)

// party is who makes a bundle and who can open it, keys read.
type party struct {
	key      *rsa.PrivateKey
	cert     *x509.Certificate
	cloud    *x509.Certificate
	account  string
	paths    []string // the files, which stay out of captures
	fallback bool     // the cloud's certificate is the user's own
}

// setting takes an option's value, or the configured one where it is not given.
func (a *app) setting(name, option, value string) string {
	if value != "" {
		a.conf.Set(name, value, option)
	}
	return a.conf.Get(name).Text
}

// party reads keys and certificates from where the options and the
// configuration say they are.
func (a *app) party(o *identity) (*party, error) {
	p := &party{}
	keyPath := a.setting("private_key", "--privatekey", o.key)
	certPath := a.setting("certificate", "--cert", o.cert)
	p.account = strings.ReplaceAll(a.setting("account_id", "--user", o.user), "-", "")
	if a.family != familyEuca {
		for _, n := range []struct{ value, option string }{{certPath, "--cert"}, {keyPath, "--privatekey"}} {
			if err := need(n.value, n.option); err != nil {
				return nil, err
			}
		}
	}
	if err := need(p.account, "--user"); err != nil {
		return nil, err
	}
	if !regexp.MustCompile(`^[0-9]+$`).MatchString(p.account) || a.family != familyEuca && len(p.account) != 12 {
		return nil, usagef("--user %q: an account number has 12 digits", p.account)
	}
	var err error
	if certPath != "" {
		if p.cert, err = keys.ReadCertificate(certPath); err != nil {
			return nil, err
		}
		p.paths = append(p.paths, certPath)
	}
	if keyPath == "" {
		a.ui.Warn("there is no private key: the manifest will say UNSIGNED", nil)
	} else {
		if p.key, err = keys.ReadPrivateKey(keyPath); err != nil {
			return nil, err
		}
		p.paths = append(p.paths, keyPath)
	}
	if p.cert != nil && p.key != nil {
		if err := keys.CheckPair(p.cert, p.key); err != nil {
			return nil, withHint(err, "The certificate comes from %s, the key from %s.", a.conf.Get("certificate").From, a.conf.Get("private_key").From)
		}
	}
	return p, a.cloudCert(p, o)
}

// cloudCert finds the certificate of the cloud that is to open the bundle.
func (a *app) cloudCert(p *party, o *identity) (err error) {
	if path := a.setting("ec2_cert", "--ec2cert", o.ec2Cert); path != "" {
		p.cloud, err = keys.ReadCertificate(path)
		return err
	}
	places := []string{filepath.Join(a.etc(), "ec2-cert.pem")}
	for _, v := range []string{"EC2_AMITOOL_HOME", "EC2_HOME"} {
		if home := a.getenv(v); home != "" {
			places = append(places, filepath.Join(home, "etc", "ec2", "amitools", "cert-ec2.pem"))
			break
		}
	}
	for _, path := range places {
		p.cloud, err = keys.ReadCertificate(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			a.ui.Debug("cloud's certificate", map[string]any{"path": path})
		}
		return err
	}
	if p.cert == nil {
		return withHint(usagef("missing option --ec2cert"), "Neither a cloud's nor the user's certificate is known: nobody could open the bundle.")
	}
	p.cloud, p.fallback = p.cert, true
	a.ui.Say("note: no certificate of a cloud is known (--ec2cert, /etc/instar/ec2-cert.pem): the bundle opens with the user's key alone")
	return nil
}

// bundleOptions makes the format's options of the command's.
func (a *app) bundleOptions(ctx context.Context, o *imageOptions, p *party) (ec2.BundleOptions, error) {
	b := ec2.BundleOptions{
		Account: p.account, KernelID: o.kernel, RamdiskID: o.ramdisk, EC2Cert: p.cloud, UserCert: p.cert, Key: p.key, PartSize: int(o.partSize),
	}
	if a.family == familyEuca {
		b.Naming = ec2.NamingEuca
	}
	for _, m := range o.mappings {
		b.BlockDeviceMapping = append(b.BlockDeviceMapping, ec2.Mapping{Virtual: m.virtual, Device: m.device})
	}
	// ec2-ami-tools keeps the argument as one code, commas and all.
	if a.family == familyEC2 && o.rawCodes != "" {
		b.ProductCodes = []string{o.rawCodes}
	} else {
		var codes list
		if err := codes.Set(o.rawCodes); err != nil {
			return b, err
		}
		b.ProductCodes = codes
	}
	if (o.encKey == "") != (o.encIV == "") {
		return b, usagef("--enc-key and --enc-iv go together")
	}
	if o.encKey != "" {
		key, err := ec2.ParseBlockKey(o.encKey)
		if err != nil {
			return b, fmt.Errorf("--enc-key: %w", err)
		}
		iv, err := ec2.ParseBlockKey(o.encIV)
		if err != nil {
			return b, fmt.Errorf("--enc-iv: %w", err)
		}
		b.EncKey, b.EncIV = &key, &iv
	}
	var err error
	if b.Arch, err = a.arch(ctx, o.arch); err != nil {
		return b, err
	}
	if strings.ContainsRune(o.prefix, '/') {
		return b, usagef("--prefix %q: a name has no /", o.prefix)
	}
	return b, nil
}

// arch settles the architecture a manifest names.
func (a *app) arch(ctx context.Context, said string) (string, error) {
	same := map[string]string{"amd64": "x86_64", "aarch64": "arm64", "386": "i386", "i686": "i386", "i586": "i386", "arm": "armhf"}
	if said == "" {
		said = runtime.GOARCH
	}
	if s, ok := same[said]; ok {
		said = s
	}
	if slices.Contains([]string{"x86_64", "i386", "arm64", "armhf", "ppc", "ppc64", "ppc64le"}, said) {
		return said, nil
	}
	a.ui.Warn(fmt.Sprintf("architecture %q is none that clouds know", said), nil)
	ok, err := a.confirm(ctx, "Go on with it?")
	if err == nil && !ok {
		err = failf(exitUsage, "architecture %q was declined", said)
	}
	return said, err
}

// sizeLimit is what old clouds accept, in bytes.
const sizeLimit = 10 << 30

func (a *app) checkSize(size int64, o *imageOptions) {
	if size > sizeLimit && !o.noSizeChecks {
		a.ui.Warn("the image is larger than 10 GiB: Amazon's and Eucalyptus' instance stores refuse it", nil)
	}
}

// trusted are the signers a bundle is accepted from. An empty list leaves the
// public half of the key that opens it.
func (a *app) trusted(o *trust, own *rsa.PrivateKey) ([]*rsa.PublicKey, error) {
	var out []*rsa.PublicKey
	add := func(path string) error {
		certs, err := keys.ReadCertificates(path)
		if err != nil {
			return err
		}
		for _, c := range certs {
			k, err := keys.PublicKey(c)
			if err != nil {
				return err
			}
			out = append(out, k)
		}
		return nil
	}
	for _, path := range []string{o.cert, o.file} {
		if path != "" {
			if err := add(path); err != nil {
				return nil, err
			}
		}
	}
	if len(out) > 0 {
		return out, nil
	}
	if path := a.conf.Get("trust").Text; path != "" {
		if err := add(path); err != nil {
			return nil, err
		}
		if own != nil {
			out = append(out, &own.PublicKey)
		}
	}
	return out, nil
}

// privateKey reads the key that opens bundles.
func (a *app) privateKey(path string) (*rsa.PrivateKey, error) {
	path = a.setting("private_key", "--privatekey", path)
	if err := need(path, "--privatekey"); err != nil {
		return nil, err
	}
	return keys.ReadPrivateKey(path)
}

// workDir is where a bundle goes when -d does not say.
func (a *app) workDir(said string) (string, error) {
	switch {
	case said != "" && a.family == familyEuca:
		if err := os.MkdirAll(said, 0o755); err != nil {
			return "", fmt.Errorf("making the destination: %w", err)
		}
		return said, nil
	case said != "":
		return said, isDir(said, "--destination")
	case a.family == familyEuca:
		return os.MkdirTemp(a.tempDir(), "bundle-")
	}
	return "/tmp", nil
}
