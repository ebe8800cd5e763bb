package userdata

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func zip(s string) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	io.WriteString(w, s)
	w.Close()
	return b.String()
}

// mime makes a multipart of header and body pairs.
func mimeOf(parts ...string) string {
	s := "Content-Type: multipart/mixed; boundary=\"B\"\nMIME-Version: 1.0\n\n"
	for i := 0; i < len(parts); i += 2 {
		s += "--B\n" + parts[i] + "\n\n" + parts[i+1] + "\n"
	}
	return s + "--B--\n"
}

const script = "#!/bin/sh\ntrue\n"

var forms = []struct {
	name, in string
	kinds    []Kind
	err      error  // wrapped by the error
	want     string // in the error
}{
	{name: "script", in: script, kinds: []Kind{Script}},
	{name: "script without line end", in: "#!/bin/sh", kinds: []Kind{Script}},
	{name: "script with CR LF", in: "#!/bin/sh\r\ntrue\r\n", kinds: []Kind{Script}},
	{name: "script with binary tail", in: "#!/bin/sh\nexit\n\x00\xff\xfe", kinds: []Kind{Script}},
	{name: "config", in: "#cloud-config\nhostname: x\n", kinds: []Kind{CloudConfig}},
	{name: "config with CR LF", in: "#cloud-config\r\nhostname: x\r\n", kinds: []Kind{CloudConfig}},
	{name: "config with blanks", in: "#cloud-config  \n", kinds: []Kind{CloudConfig}},
	{name: "config with BOM", in: "\xef\xbb\xbf#cloud-config\n", kinds: []Kind{CloudConfig}},
	{name: "include", in: "#include\nhttp://h/\n", kinds: []Kind{Include}},
	{name: "include once", in: "#include-once\nhttp://h/\n", kinds: []Kind{Include}},
	{name: "gzip", in: zip(script), kinds: []Kind{Script}},
	{name: "gzip twice", in: zip(zip(script)), kinds: []Kind{Script}},
	{name: "empty", in: ""},
	{name: "blank", in: " \n\t\n"},
	{name: "gzip of nothing", in: zip("")},
	{name: "multipart", in: mimeOf("Content-Type: text/x-shellscript", script, "Content-Type: text/cloud-config", "hostname: x"), kinds: []Kind{Script, CloudConfig}},
	{name: "multipart with CR LF", in: strings.ReplaceAll(mimeOf("Content-Type: text/x-shellscript", script), "\n", "\r\n"), kinds: []Kind{Script}},
	{name: "multipart, plain text told by its first line", in: mimeOf("Content-Type: text/plain", script), kinds: []Kind{Script}},
	{name: "multipart, no type", in: mimeOf("X-Y: z", "#cloud-config"), kinds: []Kind{CloudConfig}},
	{name: "multipart, bad type", in: mimeOf("Content-Type: ;;;", "#cloud-config"), kinds: []Kind{CloudConfig}},
	{name: "multipart, base64", in: mimeOf("Content-Type: text/x-shellscript\nContent-Transfer-Encoding: base64", "IyEvYmlu\nL3No CnRydWUK"), kinds: []Kind{Script}},
	{name: "multipart, quoted-printable", in: mimeOf("Content-Type: text/x-shellscript\nContent-Transfer-Encoding: quoted-printable", "#!/bin/sh=0Atrue"), kinds: []Kind{Script}},
	{name: "multipart, gzip in base64", in: mimeOf("Content-Type: application/octet-stream\nContent-Transfer-Encoding: base64", base64.StdEncoding.EncodeToString([]byte(zip(script)))), kinds: []Kind{Script}},
	{name: "multipart, part is a path", in: mimeOf("Content-Type: text/x-shellscript\nContent-Disposition: attachment; filename=\"../../etc/passwd\"", script), kinds: []Kind{Script}},
	{name: "multipart in multipart", in: mimeOf("Content-Type: multipart/mixed; boundary=C", "--C\nContent-Type: text/x-shellscript\n\n"+script+"\n--C--"), kinds: []Kind{Script}},
	{name: "multipart, empty part", in: mimeOf("Content-Type: text/x-shellscript", ""), kinds: nil},
	{name: "text", in: "hello\n", err: ErrUnsupported, want: "begins with none of"},
	{name: "binary", in: "\x7fELF\x00", err: ErrUnsupported, want: "begins with none of"},
	{name: "config, misspelt", in: "#cloud-configuration\n", err: ErrUnsupported, want: "begins with none of"},
	{name: "archive", in: "#cloud-config-archive\n", err: ErrUnsupported, want: "needs cloud-init"},
	{name: "boothook", in: "#cloud-boothook\n", err: ErrUnsupported, want: "needs cloud-init"},
	{name: "part handler", in: "#part-handler\n", err: ErrUnsupported, want: "needs cloud-init"},
	{name: "template", in: "## template: jinja\n#cloud-config\n", err: ErrUnsupported, want: "needs cloud-init"},
	{name: "windows", in: "<powershell>x</powershell>", err: ErrUnsupported, want: "needs cloud-init"},
	{name: "script part without #!", in: mimeOf("Content-Type: text/x-shellscript", "true"), err: ErrUnsupported, want: "#!"},
	{name: "foreign part", in: mimeOf("Content-Type: image/png", "x"), err: ErrUnsupported, want: "image/png"},
	{name: "foreign encoding", in: mimeOf("Content-Transfer-Encoding: x-uu", "x"), err: ErrUnsupported, want: "x-uu"},
	{name: "base64 that is none", in: mimeOf("Content-Transfer-Encoding: base64", "!!!"), want: "MIME: part 1"},
	{name: "gzip cut short", in: zip(script)[:20], want: "gzip"},
	{name: "gzip header alone", in: "\x1f\x8b", want: "gzip"},
	{name: "gzip bomb", in: zip(strings.Repeat("\x00", MaxBytes+1)), err: ErrLimit},
	{name: "gzip bomb in gzip", in: zip(zip(strings.Repeat("a", MaxBytes+1))), err: ErrLimit},
	{name: "gzip too often", in: zip(zip(zip(zip(zip(script))))), err: ErrLimit},
	{name: "many bombs", in: mimeOf(slices.Concat(slices.Repeat([]string{"Content-Transfer-Encoding: base64", base64.StdEncoding.EncodeToString([]byte(zip("#!" + strings.Repeat("a", MaxBytes/3))))}, 4))...), err: ErrLimit},
	{name: "10,000 parts", in: mimeOf(slices.Repeat([]string{"Content-Type: text/x-shellscript", script}, 10000)...), err: ErrLimit},
	{name: "10,000 empty parts", in: mimeOf(slices.Repeat([]string{"X: y", ""}, 10000)...), err: ErrLimit},
	{name: "multipart without boundary", in: "Content-Type: multipart/mixed\n\nx", want: "boundary"},
	{name: "multipart cut short", in: strings.TrimSuffix(mimeOf("X: y", script), "--B--\n"), want: "MIME"},
	{name: "multipart nested too deep", in: nested(8), err: ErrLimit},
	{name: "multipart without a part", in: "Content-Type: multipart/mixed; boundary=B\n\n" + script, want: "MIME"},
	{name: "header line of 1 MiB", in: "Content-Type: multipart/mixed; boundary=B; x=\"" + strings.Repeat("x", 1<<20) + "\"\n\n", want: "MIME"},
}

func nested(n int) string {
	s := script
	for i := n; i > 0; i-- {
		b := fmt.Sprintf("B%d", i)
		inner := "Content-Type: text/x-shellscript\n\n" + s
		if i < n {
			inner = s
		}
		s = fmt.Sprintf("Content-Type: multipart/mixed; boundary=%s\n\n--%s\n%s\n--%s--\n", b, b, inner, b)
	}
	return s
}

func TestForms(t *testing.T) {
	if len(forms) < 40 {
		t.Errorf("%d forms, fewer than the 40 promised", len(forms))
	}
	for _, c := range forms {
		t.Run(c.name, func(t *testing.T) {
			parts, err := Parse([]byte(c.in))
			if c.err != nil || c.want != "" {
				if err == nil || (c.err != nil && !errors.Is(err, c.err)) || !strings.Contains(err.Error(), c.want) {
					t.Errorf("error %v, want %v with %q", err, c.err, c.want)
				}
				return
			}
			must(t, err)
			var kinds []Kind
			for _, p := range parts {
				kinds = append(kinds, p.Kind)
				if strings.ContainsRune(p.Name, '/') {
					t.Errorf("name %q", p.Name)
				}
			}
			if diff := cmp.Diff(c.kinds, kinds); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// replies answers requests from a map of URLs.
type replies map[string]func() (*http.Response, error)

func (r replies) RoundTrip(req *http.Request) (*http.Response, error) {
	f := r[req.URL.String()]
	if f == nil {
		return reply(404, "")()
	}
	return f()
}

func reply(status int, body string) func() (*http.Response, error) {
	return func() (*http.Response, error) {
		return &http.Response{StatusCode: status, Status: fmt.Sprint(status), Body: io.NopCloser(strings.NewReader(body)), Header: http.Header{}}, nil
	}
}

func TestFetch(t *testing.T) {
	tries := 0
	for _, c := range []struct {
		name string
		have replies
		list string
		want string // in the error; "": one script
	}{
		{"one", replies{"http://h/a": reply(200, script)}, "http://h/a", ""},
		{"comment and blank lines", replies{"http://h/a": reply(200, script)}, "# c\n\n http://h/a \n", ""},
		{"include of an include", replies{"http://h/a": reply(200, "#include\nhttp://h/b"), "http://h/b": reply(200, script)}, "http://h/a", ""},
		{"gzip", replies{"http://h/a": reply(200, zip(script))}, "http://h/a", ""},
		{"third time lucky", replies{"http://h/a": func() (*http.Response, error) {
			if tries++; tries < 3 {
				return nil, errors.New("reset")
			}
			return reply(200, script)()
		}}, "http://h/a", ""},
		{"dead server", replies{"http://h/a": func() (*http.Response, error) { return nil, errors.New("refused") }}, "http://h/a?token=SECRET", "tried 4 times"},
		{"dead for good", replies{"http://h/a": func() (*http.Response, error) { return nil, errors.New("refused") }}, "http://h/a", "refused"},
		{"server error", replies{"http://h/a": reply(503, "")}, "http://h/a", "503"},
		{"absent", replies{}, "http://u:SECRET@h/a", "404"},
		{"loop", replies{"http://h/a": reply(200, "#include\nhttp://h/a")}, "http://h/a", "from itself"},
		{"loop of two", replies{"http://h/a": reply(200, "#include\nhttp://h/b"), "http://h/b": reply(200, "#include\nhttp://h/a")}, "http://h/a", "from itself"},
		{"too deep", replies{
			"http://h/a": reply(200, "#include\nhttp://h/b"), "http://h/b": reply(200, "#include\nhttp://h/c"),
			"http://h/c": reply(200, "#include\nhttp://h/d"), "http://h/d": reply(200, "#include\nhttp://h/e"), "http://h/e": reply(200, script),
		}, "http://h/a", "nested"},
		{"too many", replies{"http://h/a": reply(200, "")}, strings.Repeat("http://h/a\n", MaxURLs+1), "more than 32"},
		{"too long", replies{"http://h/a": reply(200, "#!"+strings.Repeat("x", MaxBytes))}, "http://h/a", "more than"},
		{"file", nil, "file:///etc/shadow", "http and https URLs only"},
		{"no host", nil, "http:///x", "http and https URLs only"},
		{"relative", nil, "/etc/shadow", "http and https URLs only"},
		{"redirect to file", replies{"http://h/a": func() (*http.Response, error) {
			r, err := reply(302, "")()
			r.Header.Set("Location", "file:///etc/shadow")
			return r, err
		}, "file:///etc/shadow": func() (*http.Response, error) { return nil, errors.New("unsupported protocol scheme") }}, "http://h/a", "unsupported protocol"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				if strings.Contains(c.list, "?token") {
					c.have[c.list] = c.have["http://h/a"]
				}
				parts, err := Parse([]byte("#include\n" + c.list))
				must(t, err)
				got, err := Fetch(t.Context(), &http.Client{Transport: c.have}, parts)
				if c.want != "" {
					if err == nil || !strings.Contains(err.Error(), c.want) {
						t.Errorf("error %v, want %q", err, c.want)
					} else if strings.Contains(err.Error(), "SECRET") {
						t.Errorf("error %v tells a secret", err)
					}
					return
				}
				must(t, err)
				if len(got) != 1 || got[0].Kind != Script || string(got[0].Data) != script {
					t.Errorf("got %v", got)
				}
			})
		})
	}
}

func TestClientRefusesMetadata(t *testing.T) {
	parts, err := Parse([]byte("#include\nhttp://169.254.169.254/latest/meta-data/\n"))
	must(t, err)
	if _, err := Fetch(t.Context(), NewClient(), parts); !errors.Is(err, ErrUnsupported) {
		t.Errorf("direct: %v", err)
	}
	for _, a := range []string{"[fd00:ec2::254]:80", "[::ffff:169.254.169.254]:80", "[fe80::1%lo]:80", "0.0.0.0:80", "169.254.1.2:443"} {
		if err := refuseLinkLocal("tcp", a, nil); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: %v", a, err)
		}
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://169.254.169.254/latest/user-data", http.StatusFound)
	}))
	defer s.Close()
	parts, err = Parse([]byte("#include\n" + s.URL + "\n"))
	must(t, err)
	if _, err := Fetch(t.Context(), NewClient(), parts); !errors.Is(err, ErrUnsupported) {
		t.Errorf("redirected: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	for _, c := range forms {
		if len(c.in) < 4096 {
			f.Add([]byte(c.in))
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		parts, err := Parse(data)
		if err != nil {
			return
		}
		total := 0
		for _, p := range parts {
			total += len(p.Data)
			if p.Kind == "" || p.Name == "" {
				t.Errorf("part %+v", p)
			}
		}
		if total > MaxBytes || len(parts) > MaxParts {
			t.Errorf("%d bytes in %d parts", total, len(parts))
		}
	})
}
