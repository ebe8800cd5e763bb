package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/instar-image/instar/test/livelog"
)

// catalogPlace is a directory with a store, keys and accounts.
type catalogPlace struct {
	t     *testing.T
	dir   string
	env   map[string]string
	trust *x509.CertPool // of https
}

func newCatalogPlace(t *testing.T) *catalogPlace {
	t.Helper()
	p := &catalogPlace{t: t, dir: t.TempDir()}
	p.env = map[string]string{"HOME": p.dir, "INSTAR_ETC": p.dir, "INSTAR_STATE": filepath.Join(p.dir, "state"), "PATH": os.Getenv("PATH")}
	for _, d := range []string{"st", "other"} {
		if err := os.Mkdir(filepath.Join(p.dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(p.dir, "key")).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v %s", err, out)
	}
	pub, err := os.ReadFile(filepath.Join(p.dir, "key.pub"))
	if err != nil {
		t.Fatal(err)
	}
	p.write("signers", `* namespaces="instar-catalog,instar-task" `+string(pub))
	p.accounts("KEY1")
	p.run(exitOK, "catalog", "create", "--store", p.path("st"), "--sign", p.path("key"), "--signers", p.path("signers"), "eu-home-1")
	p.run(exitOK, "catalog", "create", "--store", p.path("other"), "--sign", p.path("key"), "--signers", p.path("signers"), "us-home-1")
	return p
}

func (p *catalogPlace) path(name string) string { return filepath.Join(p.dir, name) }

func (p *catalogPlace) write(name, text string) {
	p.t.Helper()
	if err := os.WriteFile(p.path(name), []byte(text), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

func (p *catalogPlace) accounts(key string) {
	p.t.Helper()
	p.write("accounts.yaml", "accounts:\n- id: '111122223333'\n  keys: [{access-key-id: "+key+", secret-access-key: secret-of-"+key+"}]\n")
}

func (p *catalogPlace) getenv(name string) string { return p.env[name] }

func (p *catalogPlace) run(code int, args ...string) string {
	p.t.Helper()
	var stdout, stderr bytes.Buffer
	if got := run(append([]string{"instar"}, args...), strings.NewReader(""), &stdout, &stderr, p.getenv); got != code {
		p.t.Fatalf("%q: exit %d, want %d: %s", args, got, code, &stderr)
	}
	return stderr.String()
}

// serve runs the server and gives its address, and what ends it.
func (p *catalogPlace) serve(args ...string) (addr string, log *livelog.Log, stop func() int) {
	p.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	log = &livelog.Log{}
	args = append([]string{
		"instar", "catalog", "serve", "--store", p.path("st"), "--sign", p.path("key"), "--signers", p.path("signers"),
		"--accounts", p.path("accounts.yaml"), "--listen", "127.0.0.1:0",
	}, args...)
	ended := make(chan int, 1)
	go func() {
		ended <- newApp(args, strings.NewReader(""), io.Discard, log, p.getenv).run(ctx, args)
	}()
	stop = sync.OnceValue(func() int { cancel(); return <-ended })
	p.t.Cleanup(func() { stop() })
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		for line := range strings.Lines(log.String()) {
			var l struct{ Message, Address string }
			if json.Unmarshal([]byte(line), &l) == nil && l.Message == "serving the catalog" {
				return l.Address, log, stop
			}
		}
		if len(ended) > 0 || time.Now().After(deadline) {
			p.t.Fatalf("the server does not serve: %s", log)
		}
	}
}

// ask makes a request of the API, signed by a key whose secret is known by its
// name.
func (p *catalogPlace) ask(url, key, form string) (int, string) {
	p.t.Helper()
	r, err := http.NewRequestWithContext(p.t.Context(), "POST", url, strings.NewReader(form))
	if err != nil {
		p.t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	sum := sha256.Sum256([]byte(form))
	if err := v4.NewSigner().SignHTTP(p.t.Context(), aws.Credentials{AccessKeyID: key, SecretAccessKey: "secret-of-" + key}, r, hex.EncodeToString(sum[:]), "ec2", "eu-home-1", time.Now()); err != nil {
		p.t.Fatal(err)
	}
	return p.fetch(r)
}

func (p *catalogPlace) get(url string) (int, string) {
	p.t.Helper()
	r, err := http.NewRequestWithContext(p.t.Context(), "GET", url, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	return p.fetch(r)
}

func (p *catalogPlace) fetch(r *http.Request) (int, string) {
	p.t.Helper()
	res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: p.trust, MinVersion: tls.VersionTLS13}}}).Do(r)
	if err != nil {
		p.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return res.StatusCode, string(b)
}

func TestCatalogServe(t *testing.T) {
	p := newCatalogPlace(t)
	addr, log, stop := p.serve("--access-log", p.path("access.log"), "--endpoint", "ec2.home.example", "--zone", "eu-home-1x",
		"--other-region", "us-home-1="+p.path("other")+"@ec2.us.example", "--web-title", "The fleet", "--web-account", "111122223333", "--max-connections", "64")
	url := "http://" + addr + "/"
	has := func(want string, status int, body string) {
		t.Helper()
		if status != 200 || !strings.Contains(body, want) {
			t.Errorf("%d, without %q:\n%.2000s", status, want, body)
		}
	}
	status, body := p.ask(url, "KEY1", "Action=RegisterImage&Name=web+1&RootDeviceName=%2Fdev%2Fsda1&Version=2016-11-15")
	has("<imageId>ami-", status, body)
	status, body = p.ask(url, "KEY1", "Action=DescribeRegions")
	has("<regionEndpoint>ec2.home.example</regionEndpoint>", status, body)
	has("<regionEndpoint>ec2.us.example</regionEndpoint>", status, body)
	status, body = p.ask(url, "KEY1", "Action=DescribeAvailabilityZones")
	has("<zoneName>eu-home-1x</zoneName>", status, body)
	status, body = p.get(url + "?q=web")
	has("web 1", status, body)
	has("The fleet", status, body)
	if status, body := p.ask(url, "KEY2", "Action=DescribeImages"); status != 401 {
		t.Errorf("a key that is not there: %d %s", status, body)
	}
	// The accounts' file is read anew; one that is wrong changes nothing.
	p.accounts("KEY22")
	future := time.Now().Add(time.Second)
	if err := os.Chtimes(p.path("accounts.yaml"), future, future); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new key is taken", func() bool { status, _ := p.ask(url, "KEY22", "Action=DescribeImages"); return status == 200 })
	p.write("accounts.yaml", "accounts: what")
	eventually(t, "the log says that the accounts are wrong", func() bool {
		status, _ := p.ask(url, "KEY22", "Action=DescribeImages")
		return status == 200 && strings.Contains(log.String(), "those of before hold")
	})
	// So are the files that it names.
	secret := func(text string) {
		t.Helper()
		p.write("secret", text)
		future = future.Add(time.Second)
		if err := os.Chtimes(p.path("secret"), future, future); err != nil {
			t.Fatal(err)
		}
	}
	secret("another-secret")
	p.write("accounts.yaml", "accounts:\n- id: '111122223333'\n  keys: [{access-key-id: KEY3, secret-file: secret}]\n- id: '444455556666'\n  keys: [{access-key-id: KEY4, secret-access-key: secret-of-KEY4}]\n")
	future = future.Add(time.Second)
	if err := os.Chtimes(p.path("accounts.yaml"), future, future); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the accounts with a secret's file are taken", func() bool { status, _ := p.ask(url, "KEY4", "Action=DescribeImages"); return status == 200 })
	if status, _ := p.ask(url, "KEY3", "Action=DescribeImages"); status != 401 {
		t.Errorf("with the wrong secret: %d", status)
	}
	secret("secret-of-KEY3")
	eventually(t, "the new secret is taken", func() bool { status, _ := p.ask(url, "KEY3", "Action=DescribeImages"); return status == 200 })
	p.accounts("KEY1")
	if code := stop(); code != exitOK && code != exitInterrupt {
		t.Errorf("it ended with %d: %s", code, log)
	}
	data, err := os.ReadFile(p.path("access.log"))
	if err != nil || !strings.Contains(string(data), `"action":"RegisterImage"`) || strings.Contains(string(data), "secret-of") {
		t.Errorf("access log, %v:\n%s", err, data)
	}

	// With TLS, read only, without the page.
	if out, err := exec.Command("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=x",
		"-addext", "subjectAltName=IP:127.0.0.1", "-keyout", p.path("tls.key"), "-out", p.path("tls.crt")).CombinedOutput(); err != nil {
		t.Fatalf("openssl: %v %s", err, out)
	}
	addr, log, stop = p.serve("--tls-cert", p.path("tls.crt"), "--tls-key", p.path("tls.key"), "--read-only", "--no-web", "--access-log", "none", "--admin", "127.0.0.1:0")
	pem, err := os.ReadFile(p.path("tls.crt"))
	if err != nil {
		t.Fatal(err)
	}
	p.trust = x509.NewCertPool()
	p.trust.AppendCertsFromPEM(pem)
	if status, body := p.ask("https://"+addr+"/", "KEY1", "Action=DeregisterImage&ImageId=ami-00000000000000000"); status != 403 || !strings.Contains(body, "UnauthorizedOperation") {
		t.Errorf("read only, over TLS: %d %s", status, body)
	}
	if status, body := p.get("https://" + addr + "/"); status != 403 || !strings.Contains(body, "MissingAuthenticationToken") {
		t.Errorf("without the page: %d %s", status, body)
	}
	stop()
	if s := log.String(); strings.Contains(s, `"action"`) {
		t.Errorf("a log of requests that was not asked for:\n%s", s)
	}

	for _, c := range []struct {
		want string
		args []string
	}{
		{"is not loopback", []string{"--listen", "0.0.0.0:0"}},
		{"go together", []string{"--tls-cert", "x"}},
		{"--no-web leaves out", []string{"--no-web", "--web-title", "x"}},
		{"12 digits", []string{"--web-account", "me"}},
		{"want REGION=STORE", []string{"--other-region", "eu-home-1=" + p.path("other")}},
		{"want ADDRESS:PORT", []string{"--listen", "localhost"}},
	} {
		args := append([]string{"catalog", "serve", "--store", p.path("st"), "--sign", p.path("key"), "--signers", p.path("signers"), "--accounts", p.path("accounts.yaml")}, c.args...)
		if msg := p.run(exitUsage, args...); !strings.Contains(msg, c.want) {
			t.Errorf("%q: %q, want %q", c.args, msg, c.want)
		}
	}
	addr, _, stop = p.serve("--listen", "0.0.0.0:0", "--plain-http")
	if status, _ := p.get("http://" + addr + "/"); status != 200 {
		t.Errorf("plain HTTP gives %d", status)
	}
	stop()
	if msg := p.run(exitFile, "catalog", "serve", "--store", p.path("st"), "--accounts", p.path("nowhere")); !strings.Contains(msg, "--accounts FILE says who may ask") {
		t.Errorf("without accounts: %q", msg)
	}
}

// eventually waits for what happens within a second or two.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !f(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never came to this: %s", what)
		}
	}
}
