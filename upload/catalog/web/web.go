// Package web shows a catalog to people: a page to search for images and one
// for each of them.
//
// What goes in: a [catalog.Catalog]. What comes out: an [http.Handler] that
// answers GET and changes nothing. It shows what everybody may see, or what one
// account may, and touches nothing but the catalog. Pages are plain HTML with
// one style sheet, and work without JavaScript, of which there is none: the
// content security policy forbids it. Whatever comes from a record is text.
package web

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"html/template"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/instar-image/instar/upload/catalog"
)

// Options say what is shown. Catalog is required.
type Options struct {
	Catalog *catalog.Catalog
	// Account is whose view is shown; "" for everybody's: public images.
	Account string
	// Title stands above every page; default "Images".
	Title string
	// Launch begins the command that starts an image; default "instar launch".
	Launch string
	// Now is the clock; default time.Now.
	Now func() time.Time
	// Fault is told of what a visitor was not told; nil for nobody.
	Fault func(r *http.Request, err error)
}

//go:embed page
var files embed.FS

type site struct {
	o     Options
	pages *template.Template
	style []byte
}

// policy lets a page load its own style and nothing else.
const policy = "default-src 'none'; style-src 'self'; img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"

// New makes the handler. It asks the store nothing.
func New(o Options) (http.Handler, error) {
	if o.Catalog == nil {
		return nil, errors.New("web page: it needs a catalog")
	}
	if o.Title == "" {
		o.Title = "Images"
	}
	if o.Launch == "" {
		o.Launch = "instar launch"
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	pages, err := template.New("").Funcs(template.FuncMap{"bytes": inBytes, "day": day, "moment": moment}).ParseFS(files, "page/*.html")
	if err != nil {
		return nil, fmt.Errorf("web page: %w", err)
	}
	style, err := files.ReadFile("page/style.css")
	if err != nil {
		return nil, fmt.Errorf("web page: %w", err)
	}
	s := &site{o: o, pages: pages, style: style}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", s.handle(s.search))
	mux.HandleFunc("GET /images/{id}", s.handle(s.image))
	mux.HandleFunc("GET /style.css", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/css; charset=utf-8")
		w.Header().Set("Cache-Control", "max-age=3600")
		w.Write(s.style)
	})
	mux.HandleFunc("/", s.handle(func(context.Context, *http.Request) (string, any, error) { return "", nil, errNotFound }))
	return secured(mux), nil
}

// secured adds the headers that every answer has.
func secured(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		head := w.Header()
		head.Set("Content-Security-Policy", policy)
		head.Set("X-Content-Type-Options", "nosniff")
		head.Set("Referrer-Policy", "no-referrer")
		head.Set("X-Frame-Options", "DENY")
		head.Set("Cross-Origin-Opener-Policy", "same-origin")
		head.Set("Cross-Origin-Resource-Policy", "same-origin")
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			head.Set("Allow", "GET, HEAD")
			http.Error(w, "this page can only be read", http.StatusMethodNotAllowed)
			return
		}
		h.ServeHTTP(w, r)
	})
}

var errNotFound = errors.New("there is nothing here")

// frame is what every page shows around its own.
type frame struct {
	Site    string
	Title   string
	Account string
	Region  string
	Page    any
}

// handle renders what a page's function gives.
func (s *site) handle(f func(context.Context, *http.Request) (name string, page any, err error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		status := http.StatusOK
		name, page, err := f(r.Context(), r)
		if err != nil {
			name, status = "fault", http.StatusInternalServerError
			text := "The catalog cannot be read at the moment. Try again."
			if errors.Is(err, errNotFound) {
				status, text = http.StatusNotFound, "There is no such page, or no such image that you may see."
			} else if s.o.Fault != nil {
				s.o.Fault(r, err)
			}
			page = map[string]any{"Status": status, "Text": text}
		}
		fr := frame{Site: s.o.Title, Title: title(name, page), Account: s.o.Account, Region: s.o.Catalog.Region(), Page: page}
		var b bytes.Buffer
		if err := s.pages.ExecuteTemplate(&b, name+".html", fr); err != nil {
			if s.o.Fault != nil {
				s.o.Fault(r, err)
			}
			http.Error(w, "the page cannot be shown", http.StatusInternalServerError)
			return
		}
		h := w.Header()
		h.Set("Content-Type", "text/html; charset=utf-8")
		h.Set("Cache-Control", "no-cache")
		h.Set("Content-Length", strconv.Itoa(b.Len()))
		w.WriteHeader(status)
		w.Write(b.Bytes())
	}
}

func title(name string, page any) string {
	switch p := page.(type) {
	case *imagePage:
		return p.Name
	case *searchPage:
		if p.Words != "" {
			return "Search: " + p.Words
		}
	}
	if name == "fault" {
		return "Not shown"
	}
	return ""
}

// inBytes is a size for people.
func inBytes(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return strconv.FormatInt(n, 10) + " bytes"
	}
	f, u := float64(n)/1024, 0
	for f >= 1024 && u < len(units)-1 {
		f, u = f/1024, u+1
	}
	return strings.TrimSuffix(strconv.FormatFloat(f, 'f', 1, 64), ".0") + " " + units[u:u+1] + "iB"
}

func day(t time.Time) string { return t.UTC().Format("2 January 2006") }

func moment(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }
