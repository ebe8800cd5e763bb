package server_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog"
	"github.com/instar-image/instar/upload/catalog/ec2api"
	"github.com/instar-image/instar/upload/catalog/server"
	"github.com/instar-image/instar/upload/catalog/web"
)

// api gives an API over an empty catalog in a directory.
func api(t *testing.T) ec2api.Options {
	t.Helper()
	store, err := upload.OpenDir(t.TempDir(), false)
	check(t, err)
	t.Cleanup(func() { store.Close() })
	signer, err := keys.WriteSigningKey(filepath.Join(t.TempDir(), "key"), "")
	check(t, err)
	trust := keys.NewAllowedSigners(keys.AllowedSigner{Principals: "*", Namespaces: catalog.Namespace, Key: signer.Public()})
	c, err := catalog.Open(store, catalog.Options{Trust: trust, Signer: signer})
	check(t, err)
	check(t, c.Create(t.Context(), "test-1"))
	file := filepath.Join(t.TempDir(), "accounts.yaml")
	check(t, os.WriteFile(file, []byte(`accounts: [{id: "111111111111", keys: [{access-key-id: KEY, secret-access-key: a secret of eight}]}]`), 0o600))
	accounts, err := ec2api.ReadAccounts(file)
	check(t, err)
	return ec2api.Options{Catalog: c, Accounts: func() *ec2api.Accounts { return accounts }, Region: "test-1"}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// certify writes a certificate for loopback, of a serial number, and its key.
func certify(t *testing.T, serial int64, certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "catalog"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	check(t, err)
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	check(t, err)
	check(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o600))
	check(t, os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	// A file that was written within the same tick of the clock is another all the same.
	check(t, os.Chtimes(certFile, time.Time{}, time.Unix(serial, 0)))
}

// TestRun: systemd is told, the certificate is read anew, connections beyond
// the bound are closed at once, and the end is orderly.
func TestRun(t *testing.T) {
	dir := t.TempDir()
	told, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	check(t, err)
	defer told.Close()
	t.Setenv("NOTIFY_SOCKET", filepath.Join(dir, "notify"))
	expect := func(want string) {
		t.Helper()
		check(t, told.SetReadDeadline(time.Now().Add(time.Minute)))
		buf := make([]byte, 4096)
		n, err := told.Read(buf)
		check(t, err)
		if got := string(buf[:n]); got != want {
			t.Errorf("systemd is told %q, want %q", got, want)
		}
	}
	cert, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	certify(t, 1, cert, key)
	o := server.Options{
		API: api(t), Listen: []string{"127.0.0.1:0"}, TLSCert: cert, TLSKey: key,
		Log: zerolog.Nop(), Limits: server.Limits{Connections: 1},
	}
	o.Web = &web.Options{Catalog: o.API.Catalog, Account: "111111111111"}
	ready := make(chan []net.Addr, 1)
	o.Ready = func(a []net.Addr) { ready <- a }
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- server.Run(ctx, o) }()
	var at string
	select {
	case a := <-ready:
		at = a[0].String()
	case err := <-ended:
		t.Fatalf("the server did not start: %v", err)
	}
	expect("READY=1\nSTATUS=serving the catalog of test-1")

	dial := func() *tls.Conn {
		t.Helper()
		for {
			c, err := tls.Dial("tcp", at, &tls.Config{InsecureSkipVerify: true})
			if err == nil {
				return c
			}
			var reset *net.OpError
			if !errors.As(err, &reset) && !strings.Contains(err.Error(), "EOF") {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond) // the place of who went is not free yet
		}
	}
	serial := func(c *tls.Conn) int64 { return c.ConnectionState().PeerCertificates[0].SerialNumber.Int64() }
	first := dial()
	if got := serial(first); got != 1 {
		t.Errorf("certificate %d", got)
	}
	second, err := net.Dial("tcp", at)
	check(t, err)
	if _, err := second.Read(make([]byte, 1)); err == nil {
		t.Error("a second connection is let in")
	}
	second.Close()
	first.Close()

	certify(t, 2, cert, key)
	for renewed := false; !renewed; { // files are looked at once a second
		c := dial()
		renewed = serial(c) == 2
		c.Close()
		time.Sleep(10 * time.Millisecond)
	}
	check(t, os.WriteFile(key, []byte("nonsense"), 0o600))
	time.Sleep(1100 * time.Millisecond) // it is looked at
	c := dial()
	if got := serial(c); got != 2 {
		t.Errorf("with a key that cannot be read: certificate %d", got)
	}
	c.Close()
	cancel()
	expect("STOPPING=1")
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestNothingToListenAt(t *testing.T) {
	o := server.Options{API: api(t), Log: zerolog.Nop()}
	if err := server.Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), "no place to listen at") {
		t.Errorf("nowhere: %v", err)
	}
	o.Listen = []string{"192.0.2.77:80"}
	if err := server.Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), "listening at 192.0.2.77:80") {
		t.Errorf("elsewhere: %v", err)
	}
	o.Listen, o.TLSCert = []string{"127.0.0.1:0"}, filepath.Join(t.TempDir(), "none")
	if err := server.Run(t.Context(), o); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without its certificate: %v", err)
	}
}
