package rpcjson

import (
	"bytes"
	"compress/flate"
	"context"
	"crypto/tls"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"
)

// testdata/hostile/frames.json is made by frames below:
//
//	go test ./rpcjson -run Corpus -update
//
// browser.json is written by hand.
var updateCorpus = flag.Bool("update", false, "write testdata/hostile/frames.json anew")

// sample is a frame of the corpus and what becomes of it.
type sample struct {
	Name string `json:"name"`
	// Want is "invalid" (the channel is closed), "none" (no reply), "ok" (a
	// result), or the code of the error in the reply.
	Want  string `json:"want"`
	Reply string `json:"reply,omitempty"`
	// One of these holds the frame.
	Text     *string `json:"text,omitempty"`
	Base64   []byte  `json:"base64,omitempty"`
	Deflated []byte  `json:"deflated,omitempty"` // base64 of a raw deflate stream

	raw  []byte
	want []string // what Want may be
}

// corpusFrame bounds the frames of the corpus, so that too large ones are small.
const corpusFrame = 8 << 10

// jsonValues returns the values of the bundle package's corpus, and whether they
// are JSON in the strict sense.
func jsonValues(t testing.TB) (texts []string, ok []bool) {
	b, err := os.ReadFile("../bundle/testdata/hostile/manifests.json")
	require.NoError(t, err)
	var all []struct {
		Class, Error, Text string
		Base64, Deflated   []byte
	}
	require.NoError(t, json.Unmarshal(b, &all))
	for _, s := range all {
		if s.Class != "json" {
			continue
		}
		text := s.Text + string(s.Base64)
		if s.Deflated != nil {
			raw, err := io.ReadAll(flate.NewReader(bytes.NewReader(s.Deflated)))
			require.NoError(t, err)
			text = string(raw)
		}
		_, v, found := strings.Cut(text, `}},"x":`)
		require.True(t, found)
		texts = append(texts, strings.TrimSuffix(v, "}"))
		ok = append(ok, s.Error == "")
	}
	require.Greater(t, len(texts), 190)
	return texts, ok
}

// frames returns the hostile frames, and some that are good.
func frames(t testing.TB) (all []sample) {
	count := map[string]int{}
	add := func(class, frame string, want ...string) {
		count[class]++
		all = append(all, sample{Name: fmt.Sprint(class, " ", count[class]), raw: []byte(frame), want: want})
	}
	call := func(method, params string) string {
		return `{"id":1,"method":"` + method + `","params":` + params + `}`
	}
	const get = `"method":"OTA.GetBootState"`

	// The scanner takes all that is JSON. Of the rest, it takes what the devices
	// take; whatever it does not is refused as a whole.
	texts, ok := jsonValues(t)
	for i, v := range texts {
		if ok[i] {
			add("json", call("OTA.GetBootState", v), "ok")
			add("json argument", call("OTA.GetBootState", `{"x":`+v+`}`), map[bool]string{true: "ok", false: "invalid"}[!strings.HasPrefix(v, "[[[[[[[[[[[[[[[")])
			continue
		}
		add("no json", call("OTA.GetBootState", v), "ok", "400", "invalid")
		add("no json argument", call("OTA.CreateSnapshot", `{"set_as_revert":`+v+`}`), "400", "invalid")
	}
	for _, f := range []string{"", " ", "null", "true", "0", `""`, "[]", "{}", "{", "}", "[{" + get + "}]", "\x00", "\xff\xfe{", "\ufeff{\"id\":1," + get + "}", "GET / HTTP/1.1\r\n\r\n", "PK\x03\x04", "<xml/>", "id=1&method=OTA.Revert", `"{\"id\":1}"`, "--boundary", `{"x":1}`, `{"ID":1}`, `{"":""}`} {
		add("shape", f, "invalid")
	}
	for _, f := range []string{`{"id":1,` + get + `}`, ` {"id":1,` + get + `} `, `{` + get + `,"id":1}`, `{"v":2,"id":1,` + get + `}`, `{"id":1,` + get + `,"params":null}`, `{"id":1,` + get + `,"args":{}}`, `{"id":1,` + get + `,"unknown":[{"a":1}]}`, `{"id":1,` + get + `,}`, `{"id":1 ` + get + `}`, `{id:1,method:"OTA.GetBootState"}`, `{"id":1,` + get + `}}`, `{"id":1,` + get + `}x`, `{"id":1,` + get + `}{"id":2,"method":"OTA.Revert"}`, `{"id":1,` + get + "}\x00\x00", `{"id":1,` + get, `{"id":1,` + get + `,"x":tru`} {
		add("tolerated", f, "ok")
	}

	// Two members of a name, or nearly.
	add("duplicate", `{"id":2,"id":1,`+get+`}`, "ok")
	add("duplicate", `{"id":1,"method":"OTA.Revert",`+get+`}`, "ok")
	add("duplicate", `{"id":1,"\u006dethod":"OTA.Revert",`+get+`}`, "ok") // escaped names are other names
	for _, m := range []string{"METHOD", "Method", "\\u006dethod", "method ", " method", "method\\u0000", "m\u00e9thod", "\u217fethod", "met\\hod"} {
		want := "none"
		if strings.Contains(m, `\h`) {
			want = "none" // id came before the damage
		}
		add("case", `{"id":1,"`+m+`":"OTA.Revert"}`, want)
	}
	for _, m := range []string{"Param\u017f", "PARAMS", "Args", "p\\u0061rams"} {
		add("case", `{"id":1,"method":"OTA.SetBootState","`+m+`":{"active_slot":1}}`, "-2")
	}
	for _, m := range []string{"Active_slot", "ACTIVE_SLOT", "active_\u017flot", "active_\\u0073lot", "active_slot ", "active-slot", "active_slot\\u0000"} {
		add("case", call("OTA.SetBootState", `{"`+m+`":1}`), "-2")
	}
	add("duplicate", call("OTA.SetBootState", `{"active_slot":"x","active_slot":1}`), "ok")
	add("duplicate", call("OTA.SetBootState", `{"active_slot":1,"active_slot":"x"}`), "400")
	add("duplicate", `{"id":1,"method":"OTA.SetBootState","params":{},"args":{"active_slot":1}}`, "-2")
	add("duplicate", `{"id":1,"method":"OTA.SetBootState","args":{},"params":{"active_slot":1}}`, "ok")

	ids := map[string]string{
		`0`: "ok", `-1`: "ok", `1.5`: "ok", `1e400`: "ok", `007`: "ok", `0x10`: "ok", `99999999999999999999999`: "ok", `"x"`: "ok", `"1"`: "ok", `"\u0000"`: "ok", `"\""`: "ok", `"\ud800"`: "ok", "\"\xff\"": "ok", `"` + strings.Repeat("x", 5000) + `"`: "ok", `"</script>"`: "ok", `"\r\nX: 1"`: "ok",
		`""`: "none", `null`: "invalid", `true`: "invalid", `false`: "invalid", `[]`: "invalid", `[1]`: "invalid", `{}`: "invalid", `{"a":1}`: "invalid", `NaN`: "invalid", `+1`: "invalid", `.5`: "invalid", `1.`: "invalid", `'x'`: "invalid", `"x`: "none", `x`: "invalid", `"\x"`: "invalid", "\"\n\"": "invalid", ``: "invalid",
	}
	for _, id := range slices.Sorted(maps.Keys(ids)) {
		add("id", `{"id":`+id+`,`+get+`}`, ids[id])
	}
	methods := map[string]string{
		"OTA.GetBootState": "ok", "ota.getbootstate": "ok", "OTA.GETBOOTSTATE": "ok", `OTA.G\u0065tBootState`: "ok",
		"": "none", "Nope": "404", "OTA.": "404", "OTA": "404", ".": "404", "OTA.GetBootState ": "404", " OTA.GetBootState": "404", `OTA.GetBootState\u0000`: "404", "OTA/GetBootState": "404", "OTA.GetBoot\u017ftate": "ok", "../OTA.GetBootState": "404", "OTA.*": "404", "__proto__": "404", "constructor": "404", `\u001b[2J`: "404", `\r\nX: 1`: "404", "%s%n": "404", strings.Repeat("x", 5000): "404", "\xff": "404", "\u202e": "404", "<script>": "404", "RPC.List;reboot": "404",
	}
	for _, m := range slices.Sorted(maps.Keys(methods)) {
		add("method", `{"id":1,"method":"`+m+`"}`, methods[m])
	}
	for _, v := range []string{`null`, `1`, `true`, `[]`, `{}`, `["OTA.Revert"]`, `{"a":"OTA.Revert"}`} {
		want := "404"
		if v == "null" {
			want = "none"
		}
		add("method of another type", `{"id":1,"method":`+v+`}`, want)
	}
	for _, v := range []string{`"esp32_123456"`, `""`, `null`} {
		add("dst", `{"id":1,"dst":`+v+`,`+get+`}`, "ok")
	}
	for _, v := range []string{`"other"`, `"esp32_12345"`, `"esp32_1234567"`, `"ESP32_123456"`, `"esp32_123456 "`, `"esp32_123456\u0000"`, `"*"`, `1`, `true`, `["esp32_123456"]`, `{}`} {
		add("dst", `{"id":1,"dst":`+v+`,`+get+`}`, "invalid")
	}
	for _, m := range []string{"src", "tag"} {
		for _, v := range []string{`"x"`, `"\u0000\u001b\r\n\"\\"`, `"` + strings.Repeat("x", 3000) + `"`, `1`, `null`, `true`, `{"a":1}`, `[]`, "\"\xff\"", `"\ud800"`, `"</script>"`, `"*"`, `"+/#"`} {
			add(m, `{"id":1,"`+m+`":`+v+`,`+get+`}`, "ok")
		}
	}
	for _, f := range []string{`{"id":1,"result":1}`, `{"id":1,"error":{"code":1}}`, `{"id":1}`, `{"id":"x","src":"y"}`, `{` + get + `}`, `{"method":"Nope"}`} {
		add("nothing to answer", f, "none")
	}

	// Arguments.
	for _, v := range []string{"1.5", "1e3", "1.0", `""`, `"x"`, `"1x"`, `"0x"`, `"1e3"`, "true", "[]", "{}", "[1]", "2147483648", "-2147483649", "99999999999999999999", `"99999999999999999999"`, `"--1"`, `"+-1"`, `"\u0661"`, `"1 "`, `"1_0"`, `"0b1"`, `"NaN"`} {
		add("integer", call("OTA.SetBootState", `{"active_slot":`+v+`}`), "400")
	}
	for _, v := range []string{"1", "-1", "0", `"1"`, `"0x1"`, `"01"`, "0x1", `" 1"`, "2147483647", "-2147483648"} {
		add("integer", call("OTA.SetBootState", `{"active_slot":`+v+`}`), "ok")
	}
	for _, v := range []string{"-1", "2592001", "99999999999", "0.5", `"1s"`, `"10m"`} {
		add("commit_timeout", call("OTA.SetBootState", `{"commit_timeout":`+v+`}`), "400")
	}
	for _, v := range []string{`"true"`, `"false"`, "1", "0", `""`, "[]", "{}", `"yes"`, "[true]"} {
		add("boolean", call("OTA.CreateSnapshot", `{"set_as_revert":`+v+`}`), "400")
	}
	for _, v := range []string{"true", "false", "null"} {
		add("boolean", call("OTA.CreateSnapshot", `{"set_as_revert":`+v+`}`), "ok")
	}
	for _, v := range []string{`"x"`, `5`, `true`, `[1]`, `"{}"`, `[{"active_slot":1}]`} {
		add("parameters", call("OTA.SetBootState", v), "400")
	}
	for _, v := range []string{`{}`, `null`, `[]`, `{"x":1}`, `{"active_slot":null}`} {
		add("parameters", call("OTA.SetBootState", v), "-2")
	}
	for _, v := range []string{`""`, `"0123"`, `"0123456789abcdeg"`, `"0123456789abcdef0"`, `" 123456789abcdef"`, `1`, `true`} {
		add("trial", call("OTA.Commit", `{"trial":`+v+`}`), "400")
	}
	add("trial", call("OTA.Commit", `{"trial":[]}`), "400")
	for _, v := range []string{`"x"`, `"/etc/passwd"`, `"../../etc/passwd"`, `"\u0000"`, `"file:///etc/passwd"`} {
		add("file", call("OTA.Update", `{"file":`+v+`}`), "-1")
	}
	for _, v := range []string{`"http://127.0.0.1/"`, `"https://127.0.0.1/"`, `"https://localhost/"`, `"https://2130706433/"`, `"https://[::ffff:127.0.0.1]/"`, `"https://169.254.169.254/latest/"`, `"https://10.0.0.1/"`, `"file:///etc/passwd"`, `"gopher://x/"`, `"//x/"`, `"x"`, `"https://u:secret@[::1]/?secret"`, `"https://x:0/"`, `"\u0000"`, `"https://x\r\nY: 1/"`, `1`} {
		add("url", call("OTA.Update", `{"url":`+v+`}`), "-1")
	}
	for _, v := range []string{`[]`, `{}`} {
		add("url", call("OTA.Update", `{"url":`+v+`}`), "400")
	}
	for _, v := range []string{`"x"`, `"AAA"`, `"A==="`, `"A A="`, `"-_-_"`, `"AB=="`, `5`, `{}`, `"\u0000"`, `["AAAA"]`} {
		add("data", call("OTA.Write", `{"offset":0,"data":`+v+`}`), "400", "-1")
	}

	// Cut short, a call does nothing or what it says, but nothing else.
	whole := call("OTA.SetBootState", `{"active_slot":1,"is_committed":false}`)
	for i := range whole {
		want := []string{"invalid", "none", "400", "-2"}
		if i == len(whole)-1 {
			want = []string{"ok"}
		}
		add("cut", whole[:i], want...)
	}
	add("cut", whole, "ok")
	for c := range 0x21 {
		if c != ' ' && c != '\t' && c != '\n' && c != '\r' {
			add("control character", `{"id":1,`+get+`,"x":"`+string(rune(c))+`"}`, "ok") // after what counts
			add("control character", `{"id":1,"x":"`+string(rune(c))+`",`+get+`}`, "none")
		}
	}
	for _, n := range []int{1, 14, 15, 16, 17, 100, 1000, 3000} {
		want := "ok"
		if n > 15 {
			want = "invalid"
		}
		for _, open := range []string{"[", `{"a":`, "[{\"a\":"} {
			levels := n
			if len(open) == 6 {
				levels = n / 2
			}
			if len(open)*levels > corpusFrame-200 || levels == 0 {
				continue
			}
			inner := "0"
			end := map[string]string{"[": "]", `{"a":`: "}", "[{\"a\":": "}]"}[open]
			add("depth", `{"id":1,`+get+`,"x":`+strings.Repeat(open, levels)+inner+strings.Repeat(end, levels)+`}`, want)
		}
	}
	pad := func(n int) string { return strings.Repeat(" ", n) }
	head := `{"id":1,` + get + `}`
	add("size", head+pad(corpusFrame-len(head)), "ok")
	add("size", head+pad(corpusFrame-len(head)+1), "invalid")
	add("size", strings.Repeat("[", corpusFrame+1), "invalid")
	add("size", `{"id":1,`+get+`,"x":"`+strings.Repeat("x", corpusFrame-100)+`"}`, "ok")
	add("size", `{"id":1,`+get+`,"x":`+strings.Repeat("9", corpusFrame-100)+`}`, "ok")
	add("size", `{"id":1,`+get+`,`+strings.Repeat(`"a":0,`, 1000)+`}`, "ok")
	return all
}

// serveSample serves a frame and says what came of it.
func serveSample(t *testing.T, frame []byte) (want, reply string) {
	d := newFake()
	s := newTest(t, d, func(o *Options) { o.MaxFrame = corpusFrame })
	got, err := s.Call(context.Background(), testPeer, frame)
	switch {
	case err != nil:
		require.ErrorIs(t, err, ErrInvalidFrame)
		require.Less(t, len(err.Error()), 400)
		want = "invalid"
	case got == nil:
		want = "none"
	default:
		require.True(t, json.Valid(got), "%q", got)
		require.False(t, bytes.ContainsFunc(got, func(r rune) bool { return r < ' ' || r > '~' }), "%q", got)
		require.NotContains(t, string(got), "secret")
		var r struct {
			Result json.RawMessage
			Error  *struct{ Code int }
		}
		require.NoError(t, json.Unmarshal(got, &r))
		require.True(t, (r.Error == nil) != (r.Result == nil), "%q", got)
		want = "ok"
		if r.Error != nil {
			want = strconv.Itoa(r.Error.Code)
		}
	}
	if want != "ok" && want != "none" {
		require.Empty(t, d.log(), "the device was asked: %q", frame)
	}
	if p := d.patch; p.Active != nil && p.Committed == nil {
		require.False(t, bytes.Contains(frame, []byte("is_committed")), "half of the parameters: %q", frame)
	}
	return want, string(got)
}

func TestCorpusFrames(t *testing.T) {
	path := filepath.Join("testdata", "hostile", "frames.json")
	made := frames(t)
	if *updateCorpus {
		var b bytes.Buffer
		for i := range made {
			s := &made[i]
			synctest.Test(t, func(t *testing.T) { s.Want, s.Reply = serveSample(t, s.raw) })
			var z bytes.Buffer
			w, err := flate.NewWriter(&z, flate.BestCompression)
			require.NoError(t, err)
			_, err = w.Write(s.raw)
			require.NoError(t, err)
			require.NoError(t, w.Close())
			switch text := string(s.raw); {
			case len(text) > 1000 && z.Len() < len(text):
				s.Deflated, s.Reply = z.Bytes(), "" // replies echo what came
			case !strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r == '\ufffd' }):
				s.Text = &text
			default:
				s.Base64 = s.raw
			}
			line, err := json.Marshal(s)
			require.NoError(t, err)
			b.WriteString(map[bool]string{true: "[\n", false: ",\n"}[i == 0] + string(line))
		}
		require.NoError(t, os.WriteFile(path, append(b.Bytes(), "\n]\n"...), 0o644))
	}
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	var stored []sample
	require.NoError(t, json.Unmarshal(text, &stored))
	require.Equal(t, len(made), len(stored), "run the test with -update")
	count := map[string]int{}
	for i := range stored {
		s, m := &stored[i], &made[i]
		s.raw = s.Base64
		switch {
		case s.Text != nil:
			s.raw = []byte(*s.Text)
		case s.Deflated != nil:
			s.raw, err = io.ReadAll(flate.NewReader(bytes.NewReader(s.Deflated)))
			require.NoError(t, err)
		}
		require.Equal(t, m.Name, s.Name, "run the test with -update")
		require.True(t, bytes.Equal(m.raw, s.raw), "%s: run the test with -update", s.Name)
		require.Contains(t, m.want, s.Want, "%s: %q", s.Name, s.raw)
		count[s.Want]++
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		synctest.Test(t, func(t *testing.T) {
			want, reply := serveSample(t, s.raw)
			require.Equal(t, s.Want, want, "%s: %q", s.Name, s.raw)
			if s.Deflated == nil {
				require.Equal(t, s.Reply, reply, s.Name)
			}
		})
		runtime.ReadMemStats(&after)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(2<<20), s.Name)
	}
	t.Logf("%d frames: %v", len(stored), count)
	require.GreaterOrEqual(t, len(stored), 700)
}

// browserCase is a row of testdata/hostile/browser.json: a request to the path
// with a frame that asks for the boot state.
type browserCase struct {
	Method string      `json:"method"`
	Host   string      `json:"host"`
	Path   string      `json:"path"`
	Header http.Header `json:"header"`
	TLS    bool        `json:"tls"`
	Status int         `json:"status"`
}

func browserCases(t testing.TB) (cases []browserCase) {
	b, err := os.ReadFile("testdata/hostile/browser.json")
	require.NoError(t, err)
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	require.NoError(t, d.Decode(&cases))
	return cases
}

func (c *browserCase) serve(s *Server) *httptest.ResponseRecorder {
	return try(s, c.Method, "http://h/", good, func(r *http.Request) {
		r.Host = c.Host
		r.URL.Path, r.URL.RawQuery, _ = strings.Cut(c.Path, "?")
		if c.TLS {
			r.TLS = &tls.ConnectionState{}
		}
		for k, v := range c.Header {
			r.Header[http.CanonicalHeaderKey(k)] = v
		}
	})
}

// What web pages can send, whatever they look like, does not reach the device
// unless they are its own.
func TestBrowserCorpus(t *testing.T) {
	cases := browserCases(t)
	require.GreaterOrEqual(t, len(cases), 100)
	refused := 0
	for i, c := range cases {
		name := fmt.Sprintf("%d %+v", i, c)
		d := newFake()
		s := newTest(t, d, func(o *Options) { o.AllowOrigins = []string{"https://api.cesanta.com/"} })
		w := c.serve(s)
		require.Equal(t, c.Status, w.Code, "%s: %s", name, w.Body)
		for k := range w.Header() {
			require.NotContains(t, k, "Access-Control", name)
			require.NotContains(t, k, "Upgrade", name)
		}
		require.NotEqual(t, "Upgrade", w.Header().Get("Connection"))
		require.Equal(t, strconv.Itoa(w.Body.Len()), w.Header().Get("Content-Length"), name)
		if c.Status != 200 {
			refused++
			require.Empty(t, d.log(), name)
			require.Contains(t, w.Body.String(), fmt.Sprintf(`{"code":%d,"message":"`, c.Status), name)
		}
	}
	require.GreaterOrEqual(t, refused, 60)
}

// The device is reached only by requests that this independent reading of the
// rules allows.
func FuzzHTTP(f *testing.F) {
	for _, c := range browserCases(f) {
		f.Add(c.Method, c.Host, c.Path, c.Header.Get("Origin"), c.Header.Get("Sec-Fetch-Site"), c.Header.Get("Content-Type"), good)
	}
	f.Add("GET", "10.0.0.1", "/rpc/OTA.SetBootState?active_slot=1", "", "", "", "")
	f.Add("POST", "10.0.0.1", "/rpc/OTA.SetBootState", "", "", "application/json", `{"active_slot":1}`)
	f.Fuzz(func(t *testing.T, method, host, path, origin, site, ctype, body string) {
		d := newFake()
		s := newTest(t, d, nil)
		r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(body))
		r.Method, r.Host = method, host
		r.URL.Path, r.URL.RawQuery, _ = strings.Cut(path, "?")
		for k, v := range map[string]string{"Origin": origin, "Sec-Fetch-Site": site, "Content-Type": ctype} {
			if v != "" {
				r.Header.Set(k, v)
			}
		}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		require.True(t, w.Code >= 200 && w.Code < 600)
		if w.Body.Len() > 0 && w.Code != 400 {
			require.True(t, json.Valid(w.Body.Bytes()), "%q", w.Body)
		}
		log := d.log()
		if len(log) == 0 {
			return
		}
		name := strings.ToLower(host)
		if i := strings.LastIndexByte(name, ':'); i >= 0 && (strings.Count(name, ":") == 1 || strings.Contains(name, "]:")) {
			name = name[:i]
		}
		name = strings.Trim(name, "[]")
		if _, err := netip.ParseAddr(name); err != nil {
			require.Contains(t, []string{"localhost", "device"}, strings.TrimSuffix(name, "."), "%q", host)
		}
		if origin != "" {
			_, rest, ok := strings.Cut(origin, "://")
			require.True(t, ok)
			require.True(t, strings.EqualFold(rest, host) || strings.HasPrefix(rest, host), "%q %q", origin, host)
		}
		require.Contains(t, []string{"", "none", "same-origin"}, site)
		switch method {
		case http.MethodPost:
			require.True(t, strings.HasPrefix(strings.ToLower(strings.TrimSpace(ctype)), "application/json"), "%q", ctype)
		case http.MethodGet:
			require.Equal(t, []string{"bootstate"}, log)
		default:
			require.Fail(t, "reached", "%q", method)
		}
	})
}

// A value of a query is one value: it cannot add members, nor end the object.
func FuzzQuery(f *testing.F) {
	for _, q := range []string{"", "a=1", "a=1&b=%22x%22", "a=1,%22b%22:2", "a=%7B%7D", "a=%7D", "a", "=1", "&&", "a=1&a=2", "%22=1", "a=%zz", "%zz=1", "a=[1", "a=1%20", "a=%00", "a+b=1", "a=0x1F", "a=tru", "a=%22", "a=1%2C", "a=%5B%5D", "a=" + strings.Repeat("%5B", 20)} {
		f.Add(q)
	}
	f.Fuzz(func(t *testing.T, query string) {
		b, err := queryParams(query, 16)
		if err != nil {
			require.Less(t, len(err.Error()), 1000)
			return
		}
		var want, got []string
		for pair := range strings.SplitSeq(query, "&") {
			if pair != "" {
				k, _, _ := strings.Cut(pair, "=")
				k, err := url.QueryUnescape(k)
				require.NoError(t, err)
				want = append(want, strings.ToValidUTF8(k, "\ufffd"))
			}
		}
		require.NoError(t, members(b, 17, func(key []byte, v token) {
			got = append(got, string(unescape(key)))
			require.NotEqual(t, kindNone, v.kind)
		}))
		require.Equal(t, len(want), len(got), "%q", b)
		for i := range want {
			// Each invalid byte is one U+FFFD here.
			require.Equal(t, strings.ReplaceAll(want[i], "\ufffd", ""), strings.ReplaceAll(got[i], "\ufffd", ""))
		}
	})
}
