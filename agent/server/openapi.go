package server

import (
	"encoding"
	"fmt"
	"maps"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/instar-image/instar/agent/task"
)

// object is a JSON object of the OpenAPI document.
type object = map[string]any

// Document is the API's OpenAPI 3.1 document, made from what the server does.
func Document() object {
	paths := object{}
	sc := schemas{}
	for _, r := range (&Server{}).routes() {
		op := object{"operationId": r.ID, "summary": r.Summary, "x-role": r.Role.String()}
		var params []object
		for part := range strings.SplitSeq(r.Path, "/") {
			if name, ok := strings.CutPrefix(part, "{"); ok {
				params = append(params, object{"name": strings.TrimSuffix(name, "}"), "in": "path", "required": true, "schema": object{"type": "string"}})
			}
		}
		for _, q := range r.Query {
			params = append(params, object{
				"name": q.Name, "in": "query", "description": q.About,
				"schema": object{"type": "array", "items": object{"type": "string", "enum": q.Values}},
			})
		}
		if params != nil {
			op["parameters"] = params
		}
		if r.Body != nil {
			op["requestBody"] = object{"required": true, "content": object{"application/json": object{"schema": sc.of(reflect.TypeOf(r.Body))}}}
		}
		answers := object{}
		for _, st := range r.Statuses {
			if st >= 400 && r.Answer != nil {
				answers[strconv.Itoa(st)] = object{"$ref": "#/components/responses/Error"}
				continue
			}
			answers[strconv.Itoa(st)] = object{"description": http.StatusText(st), "content": content(r, sc)}
		}
		if r.Role > Nobody {
			answers["403"] = object{"$ref": "#/components/responses/Error"}
		}
		op["responses"] = answers
		at, _ := paths[r.Path].(object)
		if at == nil {
			at = object{}
			paths[r.Path] = at
		}
		at[strings.ToLower(r.Method)] = op
	}
	failure := sc.of(reflect.TypeFor[Error]())
	return object{
		"openapi": "3.1.0",
		"info": object{
			"title": "Instar agent", "version": "1",
			"description": "Served over a unix socket, " + DefaultSocket + ". Who calls is what the kernel says: root and the members of admin-group are admins, those of view-group viewers. x-role is the least role an operation needs.",
			"license":     object{"name": "Apache-2.0", "identifier": "Apache-2.0"},
		},
		"servers": []object{{"url": "http://localhost", "description": "as in curl --unix-socket " + DefaultSocket}},
		"paths":   paths,
		"components": object{
			"schemas": maps.Clone(object(sc)),
			"responses": object{"Error": object{
				"description": "it was not done",
				"content": object{"application/json": object{"schema": object{
					"type": "object", "required": []string{"error"}, "additionalProperties": false, "properties": object{"error": failure},
				}}},
			}},
		},
	}
}

func content(r route, sc schemas) object {
	switch {
	case r.Answer == nil:
		return object{"text/plain": object{"schema": object{"type": "string"}}}
	case r.Stream:
		return object{"application/x-ndjson": object{"schema": sc.of(reflect.TypeOf(r.Answer))}}
	}
	return object{"application/json": object{"schema": sc.of(reflect.TypeOf(r.Answer))}}
}

// schemas are the named types of the document.
type schemas object

// of is the schema of a Go type as encoding/json writes it.
func (sc schemas) of(t reflect.Type) object {
	if t.Kind() == reflect.Pointer {
		return sc.of(t.Elem())
	}
	switch t {
	case reflect.TypeFor[time.Time]():
		return object{"type": "string", "format": "date-time"}
	case reflect.TypeFor[task.State]():
		return object{"type": "string", "enum": task.States()}
	case reflect.TypeFor[task.Kind]():
		return object{"type": "string", "enum": []task.Kind{task.Bundle, task.CreateImage}}
	case reflect.TypeFor[task.Span]():
		return object{"type": "string", "examples": []string{"90s", "10m0s"}}
	}
	if t.Implements(reflect.TypeFor[encoding.TextMarshaler]()) {
		return object{"type": "string"}
	}
	switch t.Kind() {
	case reflect.String:
		return object{"type": "string"}
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.Int, reflect.Int32, reflect.Int64, reflect.Uint32, reflect.Uint64:
		return object{"type": "integer"}
	case reflect.Slice:
		return object{"type": "array", "items": sc.of(t.Elem())}
	case reflect.Map:
		return object{"type": "object", "additionalProperties": sc.of(t.Elem())}
	case reflect.Interface:
		return object{}
	case reflect.Struct:
		if _, ok := sc[t.Name()]; !ok {
			sc[t.Name()] = object{} // for a type that contains itself
			sc[t.Name()] = sc.structure(t)
		}
		return object{"$ref": "#/components/schemas/" + t.Name()}
	default:
		panic(fmt.Sprintf("server: internal error: %s has no place in the document", t))
	}
}

func (sc schemas) structure(t reflect.Type) object {
	properties := object{}
	required := []string{}
	for f := range fields(t) {
		name, opts, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "-" {
			continue
		}
		properties[name] = sc.of(f.Type)
		if !strings.Contains(opts, "omit") {
			required = append(required, name)
		}
	}
	slices.Sort(required)
	return object{"type": "object", "properties": properties, "required": required, "additionalProperties": false}
}

func fields(t reflect.Type) func(func(reflect.StructField) bool) {
	return func(yield func(reflect.StructField) bool) {
		for i := range t.NumField() {
			if f := t.Field(i); f.IsExported() && !yield(f) {
				return
			}
		}
	}
}
