package catalog

import (
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/instar-image/instar/upload/catalog"
)

// hostile is what a record may hold and a page must show as text.
const (
	hostile = `</title></textarea></style></script><script>document.title="OWNED"</script><img src=x onerror="document.title='OWNED'">&lt;b&gt;{{.}}${7*7}`
	guide   = "# Begin\n\nLog in as `root`, see [the site](https://example.org/x?a=1&b=2).\n\n" +
		"[no](javascript:document.title='OWNED') <script>document.title='OWNED'</script> **strong <i>**\n\n- one\n- two\n\n```\n<script>code</script>\n```\n"
)

// page fetches a page as a browser without a name would.
func page(t *testing.T, url string) (*http.Response, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), "GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(b)
}

// chromium opens a page in Chromium and returns the document after it was
// loaded, and a screenshot if one is asked for.
func (w *world) chromium(t *testing.T, url, shot string, args ...string) string {
	t.Helper()
	all := append([]string{
		"/usr/bin/chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
		"--user-data-dir=" + t.TempDir(), "--virtual-time-budget=3000", "--hide-scrollbars",
	}, args...)
	env := []string{"PATH=/usr/bin:/bin", "HOME=" + w.dir, "LC_ALL=C.UTF-8"}
	if shot != "" {
		w.run(t, env, append(all, "--screenshot="+shot, url)...)
		if st, err := os.Stat(shot); err != nil || st.Size() < 5000 {
			t.Fatalf("no screenshot: %v", err)
		}
		return ""
	}
	return w.run(t, env, append(all, "--dump-dom", url)...)
}

// publish puts an image with all a record can hold into the catalog, and makes
// it public.
func (w *world) publish(t *testing.T, name string, change func(*catalog.Image)) string {
	t.Helper()
	var out struct {
		ImageID string `xml:"imageId"`
	}
	body := w.api(t, "Action=RegisterImage&Architecture=x86_64&RootDeviceName=%2Fdev%2Fsda1&VirtualizationType=hvm&Name="+name)
	if err := xml.Unmarshal([]byte(body), &out); err != nil || out.ImageID == "" {
		t.Fatalf("%v: %s", err, body)
	}
	w.api(t, "Action=ModifyImageAttribute&LaunchPermission.Add.1.Group=all&LaunchPermission.Add.2.UserId="+bob+"&ImageId="+out.ImageID)
	// The API has no word for the rest: as "images register" puts it.
	w.modify(t, out.ImageID, change)
	return out.ImageID
}

// TestWebPage looks at the page with Chromium: an image is found by search and
// read; what a hostile record holds stays text.
func TestWebPage(t *testing.T) {
	w := newWorld(t, "--web-account", alice, "--web-title", "The fleet's images")
	public := w.serve(t, w.bucket) // what everybody sees
	nice := w.publish(t, "web+server+2026-11", func(m *catalog.Image) {
		m.Description, m.GettingStarted = "nginx on Debian 12, with the fleet's certificates", guide
		m.Kind, m.Location, m.Digest, m.Signer = catalog.KindInstar, "web-1@"+strings.Repeat("ab", 32), strings.Repeat("ab", 32), "ssh-ed25519 SHA256:0123456789abcdefghijklmnopqrstuvwxyzABCDEFG"
		m.Size, m.Stored, m.Added = 8<<30, 912<<20, 41<<20
		m.Parameters = []catalog.Parameter{
			{Name: "DOMAIN", Type: "string", Required: true, Help: "the name the server answers to"},
			{Name: "SIZE", Type: "choice", Default: "small", Choices: []string{"small", "large"}, Help: "how many workers it starts"},
		}
		m.Files = []catalog.File{{Path: "/etc/motd", Content: []byte("hello")}}
		m.BlockDevices = []catalog.BlockDevice{{Device: "/dev/sdb", Virtual: "ephemeral0"}}
		m.Tags = catalog.Tags{"stage": "production", "team": "web"}
	})
	bad := w.publish(t, "hostile", func(m *catalog.Image) {
		m.Description = hostile
		m.GettingStarted = hostile + "\n\n" + guide
		m.Tags = catalog.Tags{hostile[:120]: hostile}
		m.Name = "x'@ /x" // what a name may hold of it
	})
	for i := range 3 {
		w.publish(t, fmt.Sprintf("database+%d", i), func(m *catalog.Image) { m.Description = "PostgreSQL"; m.Architecture = "arm64" })
	}

	// Found by search, without a script.
	dom := w.chromium(t, w.url+"/?q=certificates", "")
	if !strings.Contains(dom, `href="/images/`+nice+`"`) || strings.Contains(dom, "database 1") {
		t.Errorf("searching gives\n%s", dom)
	}
	if dom := w.chromium(t, w.url+"/?q=production", ""); !strings.Contains(dom, nice) {
		t.Error("its owner does not find an image by its tag")
	}
	if _, dom := page(t, public+"/?q=production"); strings.Contains(dom, nice) {
		t.Error("strangers find an image by its owner's tag")
	}
	dom = w.chromium(t, w.url+"/images/"+nice, "")
	for _, want := range []string{
		"<h1>web server 2026-11</h1>", `<a href="https://example.org/x?a=1&amp;b=2" rel="noopener noreferrer nofollow">the site</a>`, "8 GiB", "41 MiB", "DOMAIN",
		"instar launch " + nice, "production", "RegisterImage", "signature verified when it was registered", "<code>root</code>", "/etc/motd",
	} {
		if !strings.Contains(dom, want) {
			t.Errorf("the image's page has no %q", want)
		}
	}
	if t.Failed() {
		t.Log(dom)
	}
	_, dom = page(t, public+"/images/"+nice)
	for _, secret := range []string{"production", bob, "RegisterImage"} {
		if strings.Contains(dom, secret) {
			t.Errorf("strangers are shown %q", secret)
		}
	}

	// Hostile records.
	for _, url := range []string{w.url + "/images/" + bad, w.url + "/?q=" + "x", public + "/images/" + bad, w.url + "/?q=%3Cscript%3Edocument.title%3D%22OWNED%22%3C%2Fscript%3E"} {
		dom := w.chromium(t, url, "")
		low := strings.ToLower(dom)
		if strings.Contains(dom, "<title>OWNED") || strings.Contains(low, "<script") || strings.Contains(low, "<img") || strings.Contains(low, `href="javascript:`) {
			t.Errorf("%s: what a record holds became more than text:\n%s", url, dom)
		}
	}
	if _, text := page(t, w.url+"/images/"+bad); !strings.Contains(text, "&lt;script&gt;document.title=") {
		t.Errorf("the hostile text is not shown as text:\n%s", text)
	}

	// Headers, and what is not there.
	for path, status := range map[string]int{"/": 200, "/images/" + nice: 200, "/images/ami-00000000000000000": 404, "/images/x": 404, "/etc/passwd": 404, "/style.css": 200} {
		res, body := page(t, w.url+path)
		csp := res.Header.Get("Content-Security-Policy")
		if res.StatusCode != status || !strings.Contains(csp, "default-src 'none'") || strings.Contains(csp, "script") || res.Header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s: %d, want %d, %v", path, res.StatusCode, status, res.Header)
		}
		if path != "/style.css" && (!strings.Contains(body, `<html lang="en">`) || strings.Contains(strings.ToLower(body), "<script")) {
			t.Errorf("%s gives\n%s", path, body)
		}
	}
	w.api(t, "Action=ModifyImageAttribute&LaunchPermission.Remove.1.Group=all&ImageId="+nice)
	hidden, a := page(t, public+"/images/"+nice)
	never, b := page(t, public+"/images/ami-00000000000000000")
	if hidden.StatusCode != 404 || never.StatusCode != 404 || a != b {
		t.Error("the page tells an image that is there from one that is not")
	}

	// For people to look at: INSTAR_SCREENSHOTS names a directory that gets all.
	shots := os.Getenv("INSTAR_SCREENSHOTS")
	for _, c := range []struct {
		name, path, size string
		dark, always     bool
	}{
		{"search-light", "/", "1200,900", false, false},
		{"search-dark", "/?q=web", "1200,900", true, false},
		{"search-narrow", "/", "500,1600", false, false},
		{"image-light", "/images/" + nice, "1200,2600", false, false},
		{"image-dark", "/images/" + nice, "1200,2600", true, true},
		{"image-narrow", "/images/" + nice, "500,3600", false, false},
		{"hostile-narrow", "/images/" + bad, "500,3000", false, false},
	} {
		dir := shots
		if dir == "" {
			if !c.always {
				continue
			}
			dir = t.TempDir()
		}
		args := []string{"--window-size=" + c.size}
		if c.dark {
			args = append(args, "--blink-settings=preferredColorScheme=0")
		}
		w.chromium(t, w.url+c.path, filepath.Join(dir, c.name+".png"), args...)
	}
}

// modify changes a record as its owner, through the store.
func (w *world) modify(t *testing.T, id string, change func(*catalog.Image)) {
	t.Helper()
	k := w.open(t)
	_, err := k.Modify(t.Context(), catalog.Call{Account: alice, By: "the test"}, id, "Modify", "", func(m *catalog.Image) error { change(m); return nil })
	if err != nil {
		t.Fatal(err)
	}
}
