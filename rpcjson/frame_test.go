package rpcjson

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptrace"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
)

func TestFrameVectors(t *testing.T) {
	var v struct {
		Cases []struct {
			Name, Request string
			Reply         *string
			Closed        string `json:"non_persistent_channel"`
		}
	}
	readVectors(t, "frames.json", &v)
	require.Len(t, v.Cases, 27)
	for _, c := range v.Cases {
		t.Run(c.Name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newFake()
				d.errs["commit"] = &ota.Error{Op: "commit", Slot: 0, Off: -1, Err: ota.ErrCommitted}
				s := newTest(t, d, nil)
				if c.Name == "reboot-lockout" {
					do(t, s, "Sys.Reboot", `{"delay_ms":80}`)
				}
				got, err := s.Call(context.Background(), testPeer, []byte(c.Request))
				if c.Closed != "" {
					require.ErrorIs(t, err, ErrInvalidFrame)
					require.Empty(t, d.log(), "nothing may run")
				} else {
					require.NoError(t, err)
				}
				if c.Reply == nil {
					require.Nil(t, got)
				} else {
					require.Equal(t, *c.Reply, string(got))
				}
				if c.Name == "id-absent" || c.Name == "id-empty-string" {
					require.Equal(t, []string{"bootstate"}, d.log())
				}
			})
		})
	}
}

func TestIDs(t *testing.T) {
	for in, want := range map[string]string{
		`0`:                      `0`,
		`007`:                    `"007"`, // 007 is no JSON number
		`"12345678901234567890"`: `12345678901234567890`,
		`1e3`:                    `"1e3"`,
		`"a\"\\\u00e4"`:          `"a\"\\\u00e4"`,
		`"\ud83d\ude00"`:         `"\ud83d\ude00"`,
		`"\ud83d!"`:              `"\ufffd!"`,
		`"\t\n\r\b\f\/"`:         `"\t\n\r\u0008\u000c/"`,
		`{}`:                     "",
		`[]`:                     "",
		`false`:                  "",
		`null`:                   "",
	} {
		s := newTest(t, newFake(), nil)
		got, err := s.Call(context.Background(), testPeer, []byte(`{"id":`+in+`,"method":"OTA.Revert"}`))
		if want == "" {
			require.ErrorIs(t, err, ErrInvalidFrame, in)
			continue
		}
		require.NoError(t, err, in)
		require.Equal(t, `{"id":`+want+`,"src":"esp32_123456","result":null}`, string(got))
		require.True(t, json.Valid(got))
	}
}

func TestHostileFrames(t *testing.T) {
	deep := strings.Repeat(`{"a":`, 100)
	for name, c := range map[string]struct{ frame, want string }{
		"empty":             {"", "invalid frame: byte 0: need an object"},
		"array":             {`[{"method":"OTA.Commit"}]`, "byte 0: need an object"},
		"nul":               {"\x00", "need an object"},
		"open string":       {`{"method`, "need a closing quote"},
		"bad escape":        {`{"\x":1}`, "need an escape sequence"},
		"control character": {"{\"a\n\":1}", "need a string without control characters"},
		"no colon":          {`{"id" 1}`, "need a colon"},
		"no value":          {`{"id":}`, "need a value"},
		"bad word":          {`{"id":nul}`, "need null"},
		"bad fraction":      {`{"id":1.}`, "need a digit"},
		"lone minus":        {`{"id":-}`, "need a digit"},
		"bad hex":           {`{"id":0x}`, "need a digit"},
		"bad exponent":      {`{"id":1e+}`, "need a digit"},
		"bad key":           {`{5:1}`, "need a member name"},
		"too deep":          {`{"id":1,"method":"OTA.Commit","params":` + deep, "nested too deeply"},
		"too deep array":    {`{"id":1,"method":"OTA.Commit","x":` + strings.Repeat("[", 100), "nested too deeply"},
		"only unknown":      {`{"foo":1,"ID":3}`, "no known member"},
		"too large":         {`{"id":1,"method":"OTA.Commit"}` + strings.Repeat(" ", DefaultMaxFrame), "at most 131072"},
		"dst with newline":  {`{"id":1,"method":"OTA.Commit","dst":"a\nb"}`, `for "a\nb"`},
	} {
		t.Run(name, func(t *testing.T) {
			d := newFake()
			s := newTest(t, d, nil)
			got, err := s.Call(context.Background(), testPeer, []byte(c.frame))
			require.ErrorIs(t, err, ErrInvalidFrame)
			require.ErrorContains(t, err, c.want)
			require.Equal(t, name == "too large", errors.Is(err, ota.ErrTooLarge))
			require.Nil(t, got)
			require.Empty(t, d.log())
		})
	}
}

// Depth is counted alike for objects and arrays, and given back.
func TestDepth(t *testing.T) {
	nest := func(n int) string { return strings.Repeat("[", n) + strings.Repeat("]", n) }
	for n := range 20 {
		_, err := parseFrame([]byte(`{"id":1,"x":[`+nest(n)+`,`+nest(n)+`]}`), 16)
		require.Equal(t, n+2 > 16, err != nil, n)
	}
}

// What the scanner of the original takes, although it is no JSON.
func TestTolerance(t *testing.T) {
	for _, frame := range []string{
		`{id:1,method:"OTA.GetBootState"}`,
		`{"id":1,"method":"OTA.GetBootState",}`,
		`{"id":1 "method":"OTA.GetBootState"}`,
		` { "id" : 1 , "method" : "OTA.GetBootState" } trailing`,
		`{"id":2,"id":1,"method":"nope","method":"OTA.GetBootState"}`,
		`{"id":1,"method":"OTA.GetBootState","x":[1,2,{"a":[true,false,null]}],"y":0x1F,"z":-1.5E+3}`,
		`{"id":1,"method":"OTA.GetBootState","x":tru`,
	} {
		got, err := newTest(t, newFake(), nil).Call(context.Background(), testPeer, []byte(frame))
		require.NoError(t, err, frame)
		require.Contains(t, string(got), `"id":1,"src":"esp32_123456","result":{"active_slot": 0,`, frame)
	}
}

// A method must not run on half of its parameters.
func TestDamagedParams(t *testing.T) {
	d := newFake()
	s := newTest(t, d, nil)
	for _, frame := range []string{
		`{"id":1,"src":"t","method":"OTA.CreateSnapshot","params":{"set_as_revert":true,"commit_ti`,
		`{"id":1,"src":"t","method":"OTA.CreateSnapshot","args":{"set_as_revert":tru`,
		`{"id":1,"src":"t","method":"OTA.CreateSnapshot","params":`,
	} {
		got, err := s.Call(context.Background(), testPeer, []byte(frame))
		require.NoError(t, err)
		require.Contains(t, string(got), `"error":{"code":400,"message":"bad request: params: byte `)
	}
	for _, params := range []string{`"x"`, `5`, `true`, `[1]`, `{"a":{"b":1}`} {
		_, err := parseParams([]byte(params), 16)
		if params[0] != '{' {
			require.NoError(t, err)
			require.Contains(t, do(t, s, "OTA.CreateSnapshot", params), `"error":{"code":400,"message":"need an object of arguments, got `)
		}
	}
	require.Empty(t, d.log())
}

// What changes something must not run on half of a frame. A frame, like its
// parameters, may lack what closes it, but nothing else.
func TestBrokenFrames(t *testing.T) {
	const head = `{"src":"t","id":1,"method":"`
	for rest, want := range map[string]string{
		`'params':{"commit_timeout":300}}`:           "need a member name",
		`'params':{"commit_timeout":300}`:            "need a member name",
		`"par`:                                       "need a closing quote",
		`"params"`:                                   "need a colon",
		``:                                           "need a member name",
		`;"params":{"commit_timeout":300}}`:          "need a member name",
		`"x":tru`:                                    "need true",
		`"x":{"y":1`:                                 "need a member name",
		`"params":{"set_as_revert":true},'x':1}`:     "need a member name",
		`"params":{"set_as_revert":true},"x":1,`:     "need a member name",
		`"params":{"set_as_revert":true,'a':1}}`:     "need a member name",
		`"params":{"set_as_revert":true`:             "need a member name",
		`"params":{"set_as_revert":true}`:            "",
		`"params":{"set_as_revert":true,} `:          "",
		`params:{"set_as_revert":true "x":1} "y":[]`: "",
	} {
		d := newFake()
		s := newTest(t, d, nil)
		got, err := s.Call(context.Background(), testPeer, []byte(head+`OTA.CreateSnapshot",`+rest))
		require.NoError(t, err)
		if want == "" {
			require.Contains(t, string(got), `"result":{"slot": 1}`, rest)
			require.True(t, d.snap.SetAsRevert)
			continue
		}
		require.Contains(t, string(got), `"error":{"code":400,"message":"bad request: `, rest)
		require.Contains(t, string(got), want, rest)
		require.Empty(t, d.log(), rest)

		// Looking is harmless, unless the parameters themselves are damaged.
		got, err = s.Call(context.Background(), testPeer, []byte(head+`OTA.GetBootState",`+rest))
		require.NoError(t, err)
		damaged := strings.HasPrefix(rest, `"params":{"set_as_revert":true,'`) || rest == `"params":{"set_as_revert":true`
		require.Equal(t, damaged, strings.Contains(string(got), `"error":{"code":400,`), "%s: %s", rest, got)
	}
}

// Parameters that stand alone may lack their last brace only.
func TestBrokenParams(t *testing.T) {
	for params, ok := range map[string]bool{
		`{"set_as_revert":true`:                         true,
		" {\"x\":{},\"set_as_revert\":true \r\n":        true,
		`{"set_as_revert":true,}`:                       true,
		`{"set_as_revert":true}junk`:                    true,
		`{`:                                             false,
		`{"set_as_revert":true,`:                        false,
		`{"set_as_revert":true,"commit_ti`:              false,
		`{"set_as_revert":true,"commit_timeout"`:        false,
		`{"set_as_revert":true,"commit_timeout":`:       false,
		`{"set_as_revert":true,'commit_timeout':300}`:   false,
		`{"set_as_revert":true;"commit_timeout":300}`:   false,
		`{"set_as_revert":true,"commit_timeout":{"a":1`: false,
	} {
		d := newFake()
		s := newTest(t, d, nil)
		w := try(s, "POST", "/rpc/OTA.CreateSnapshot", params, nil)
		a := &Args{tok: token{kindObject, []byte(strings.TrimSpace(params))}, depth: 16}
		v, _ := a.Bool("set_as_revert")
		require.Equal(t, ok, v, params)
		if ok {
			require.Equal(t, 200, w.Code, params)
			require.True(t, d.snap.SetAsRevert)
			require.NoError(t, a.Err(), params)
			continue
		}
		require.Contains(t, w.Body.String(), `{"code":400,"message":"bad request: params: byte `, params)
		require.Empty(t, d.log(), params)
		require.ErrorContains(t, a.Err(), "well-formed arguments", params)
	}
}

func TestArgVectors(t *testing.T) {
	// Where the original ignores or garbles what it gets, and this does not.
	strict := map[string]string{
		`%d {"commit_timeout":3.9}`:         "a fraction is no integer",
		`%d {"commit_timeout":3e2}`:         "an exponent is no integer",
		`%d {"commit_timeout":"3.9"}`:       "a fraction is no integer",
		`%d {"commit_timeout":true}`:        "a boolean is no integer",
		`%d {"commit_timeout":"abc"}`:       "no number",
		`%d {"commit_timeout":"12abc"}`:     "a number and more",
		`%d {"commit_timeout":""}`:          "an empty string is no number; the original reads 0",
		`%d {"commit_timeout":[300]}`:       "an array is no integer",
		`%d {"commit_timeout":{"a":300}}`:   "an object is no integer",
		`%d {"commit_timeout":99999999999}`: "does not fit; the original cuts it to 32 bits",
		`%B {"is_committed":"true"}`:        "a string is no boolean; the original reads false",
		`%B {"is_committed":1}`:             "a number is no boolean; the original reads false",
		`%B {"is_committed":0}`:             "a number is no boolean",
		`%B {"is_committed":"false"}`:       "a string is no boolean",
		`%V {"data":"aGVsbG8"}`:             "padding missing; the original loses the last group",
		`%V {"data":"aGV\nsbG8="}`:          "a line break inside; the original makes garbage of it",
		`%V {"data":"-_-_"}`:                "the other alphabet; the original makes garbage of it",
	}
	// Where null counts as given in the original.
	null := map[string]bool{`%B {"is_committed":null}`: true, `%V {"data":null}`: true}

	var v struct {
		Cases []struct {
			Conversion, Arg, JSON string
			Matches               int
			Int                   int64
			Bool                  bool
			String                string
			Bytes                 string `json:"bytes_b64"`
			IsString              bool   `json:"token_is_string"`
		}
	}
	readVectors(t, "args.json", &v)
	require.Len(t, v.Cases, 72)
	refused, nulls := 0, 0
	for _, c := range v.Cases {
		name := c.Conversion + " " + c.JSON
		tok, err := parseParams([]byte(c.JSON), 16)
		require.NoError(t, err, name)
		a := Args{tok: tok, depth: 16}
		var got, want, zero any
		var given bool
		switch c.Conversion {
		case "%d":
			got, given = a.Int(c.Arg, math.MinInt32, math.MaxInt32)
			want, zero = c.Int, int64(0)
		case "%ld":
			got, given = a.Int(c.Arg, math.MinInt64, math.MaxInt64)
			want, zero = c.Int, int64(0)
		case "%B":
			got, given = a.Bool(c.Arg)
			want, zero = c.Bool, false
		case "%Q":
			got, given = a.String(c.Arg)
			want, zero = c.String, ""
		case "%T":
			raw, isString, ok := a.Token(c.Arg)
			got, given = string(raw), ok
			want, zero = c.String, ""
			require.Equal(t, c.IsString, isString, name)
		case "%V":
			b, ok := a.Bytes(c.Arg)
			got, given = base64.StdEncoding.EncodeToString(b), ok
			want, zero = c.Bytes, ""
		default:
			t.Fatalf("unknown conversion %s", c.Conversion)
		}
		if why := strict[name]; why != "" {
			refused++
			var e *ArgError
			require.ErrorAs(t, a.Err(), &e, "%s: %s", name, why)
			require.ErrorIs(t, a.Err(), ota.ErrInvalid)
			require.Equal(t, c.Arg, e.Name)
			require.False(t, given, name)
			continue
		}
		require.NoError(t, a.Err(), name)
		if c.Matches == 0 || null[name] {
			if null[name] {
				nulls++
			}
			require.False(t, given, name)
			require.Equal(t, zero, got, name)
			continue
		}
		require.True(t, given, name)
		require.Equal(t, want, got, name)
	}
	require.Equal(t, len(strict), refused, "every exception must be used")
	require.Equal(t, len(null), nulls)
}

func TestArgs(t *testing.T) {
	args := func(s string) *Args {
		tok, err := parseParams([]byte(s), 16)
		require.NoError(t, err)
		return &Args{tok: tok, depth: 16}
	}
	for _, s := range []string{`"+-5"`, `"--5"`, `"0x"`, `"0x-5"`, `"0-5"`, `"1_0"`, `"0b1"`, `"0o7"`, `"08"`, `"5 "`, `"+"`, `9223372036854775808`} {
		a := args(`{"n":` + s + `}`)
		_, given := a.Int("n", math.MinInt64, math.MaxInt64)
		require.Error(t, a.Err(), s)
		require.False(t, given, s)
	}
	for s, want := range map[string]int64{`"+5"`: 5, `"-0x10"`: -16, `0x10`: 16, `"-010"`: -8, `"00"`: 0, `-9223372036854775808`: math.MinInt64} {
		a := args(`{"n":` + s + `}`)
		n, given := a.Int("n", math.MinInt64, math.MaxInt64)
		require.NoError(t, a.Err(), s)
		require.True(t, given)
		require.Equal(t, want, n, s)
	}
	a := args(`{"n":7,"s":{}}`)
	_, _ = a.Int("n", 0, 6)
	require.EqualError(t, a.Err(), `n: need an integer from 0 to 6, got "7"`)
	_, _ = a.String("s")
	require.ErrorContains(t, a.Err(), "n: ", "the first error stays")
	a = args(`{"s":[]}`)
	_, _ = a.String("s")
	require.EqualError(t, a.Err(), `s: need a string, got "[]"`)
	a = args(`{"b":5,"long":"` + strings.Repeat("x", 1000) + `"}`)
	_, _ = a.Bytes("b")
	require.EqualError(t, a.Err(), `b: need a string in padded base64, got "5"`)
	require.Equal(t, 1017, len(a.Raw()))

	// Base64 whose slashes came escaped.
	a = args(`{"data":"eB=="}`)
	_, given := a.Bytes("data")
	require.False(t, given, "bits that are lost")
	require.Error(t, a.Err())
	a = args(`{"data":"\/\/\/\/"}`)
	b, ok := a.Bytes("data")
	require.True(t, ok)
	require.Equal(t, []byte{0xff, 0xff, 0xff}, b)

	// Damage inside a value, depth, and damage between members.
	for _, s := range []string{`{"a":{"n":1}`, `{"a":tru,"n":1}`} {
		_, err := parseParams([]byte(s), 16)
		if s == `{"a":{"n":1}` {
			require.NoError(t, err) // ends between two members
		} else {
			require.Error(t, err)
		}
	}
	bad := &Args{tok: token{kindObject, []byte(`{"n":1,"a":tru`)}, depth: 16}
	_, given = bad.Int("n", 0, 9)
	require.False(t, given)
	require.ErrorContains(t, bad.Err(), "well-formed arguments")
}

func TestErrorText(t *testing.T) {
	require.EqualError(t, &Error{Code: -1}, "rpcjson: error -1")
	require.EqualError(t, &Error{Code: 404, Message: "x"}, "rpcjson: error 404: x")
	require.Equal(t, "read operate install unknown (9)", Read.String()+" "+Operate.String()+" "+Install.String()+" "+Right(9).String())
	long := strings.Repeat("n", 200)
	require.NotContains(t, do(t, newTest(t, newFake(), nil), long, ""), long)
	require.Contains(t, do(t, newTest(t, newFake(), nil), `a\u001bb`, ""), `No handler for \"a\\x1bb\"`)
}

func FuzzFrame(f *testing.F) {
	var v struct{ Cases []struct{ Request string } }
	readVectors(f, "frames.json", &v)
	for _, c := range v.Cases {
		f.Add([]byte(c.Request))
	}
	var a struct{ Cases []struct{ JSON string } }
	readVectors(f, "args.json", &a)
	for _, c := range a.Cases {
		f.Add([]byte(`{"id":1,"method":"m","params":` + c.JSON + `}`))
	}
	f.Add([]byte("{\"id\":\"\ufffd\\ufffd\\ud800\xff\",\"method\":\"m\"}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		start := time.Now()
		fr, err := parseFrame(b, 16)
		if err != nil {
			require.ErrorIs(t, err, ErrInvalidFrame)
			return
		}
		require.True(t, fr.id != "" || fr.method != "")
		if fr.id == "" {
			return // nothing is answered
		}
		reply := appendReply(nil, &fr, "dev", []byte("null"), nil)
		require.True(t, json.Valid(reply), "%q", reply)
		require.False(t, bytes.ContainsFunc(reply, func(r rune) bool { return r < ' ' || r >= 0x7f }), "%q", reply)
		back, err := parseFrame(reply, 16)
		require.NoError(t, err)
		require.Equal(t, string([]rune(fr.id)), back.id, "what is no UTF-8 becomes U+FFFD")
		require.True(t, json.Valid(appendError(nil, errorf(1, "%s", fr.method))))
		if fr.paramsErr == nil {
			args := Args{tok: fr.params, depth: 16}
			for _, name := range []string{"commit_timeout", "offset", "is_committed", "url", "data", "a"} {
				n, given := args.Int(name, -5, 5)
				require.True(t, n >= -5 && n <= 5 && (given || n == 0))
				args.Bool(name)
				s, _ := args.String(name)
				require.LessOrEqual(t, len(s), len(b))
				d, _ := args.Bytes(name)
				require.LessOrEqual(t, len(d), len(b))
				args.Token(name)
			}
			// What encoding/json takes for an object must be one here too.
			var m map[string]json.RawMessage
			if fr.params.kind == kindObject && json.Unmarshal(b, &m) == nil {
				require.True(t, json.Valid(fr.params.raw), "%q", fr.params.raw)
			}
		}
		require.Less(t, time.Since(start), 5*time.Second)
	})
}

// The arguments that are found while a frame is read are those that a second look
// finds.
func TestFrameArgs(t *testing.T) {
	many := "{"
	for i := range 2 * maxRemembered {
		many += fmt.Sprintf(`"k%d":%d,`, i, i)
	}
	for _, params := range []string{
		`{"a":1,"b":{"a":2},"c":[{"a":3}],"a":"x"}`, `{}`, `[]`, `5`, `null`, `{a:1 b:2}`, many + `"k0":"last"}`,
	} {
		for _, frame := range []string{
			`{"auth":{"a":7},"method":"m","params":` + params + `}`, `{"args":{"a":7},"method":"m","params":` + params + `,"auth":{"b":7}}`,
			`{"params":{"a":7},"params":` + params + `,"method":"m","args":{"b":7}}`, `{"method":"m","args":` + params + `,"v":{"b":7}}`,
		} {
			f, err := parseFrame([]byte(frame), 10)
			require.NoError(t, err)
			require.Equal(t, params, string(f.params.raw), frame)
			once := Args{tok: f.params, depth: 10, all: f.args, scanned: f.args != nil}
			again := Args{tok: f.params, depth: 10}
			for _, name := range []string{"a", "b", "c", "k0", "k31", "x"} {
				require.Equal(t, again.find(name), once.find(name), "%s %s", frame, name)
			}
			require.Equal(t, again.Err(), once.Err())
		}
	}
}

// Memory of a request is used again once the transport has written it, and not
// before.
func TestRequestMemory(t *testing.T) {
	frame := bytes.Repeat([]byte("a frame"), 2000)
	for _, c := range []struct {
		name   string
		traces func(*httptrace.ClientTrace)
	}{
		{"answered early", func(c *httptrace.ClientTrace) { c.GotConn(httptrace.GotConnInfo{}) }},
		{"sent again, and answered early", func(c *httptrace.ClientTrace) {
			c.GotConn(httptrace.GotConnInfo{})
			c.WroteRequest(httptrace.WroteRequestInfo{})
			c.GotConn(httptrace.GotConnInfo{})
		}},
		{"not told", func(*httptrace.ClientTrace) {}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := &httpChannel{url: "http://127.0.0.1/rpc", client: &http.Client{}}
			var first *http.Request
			h.client.Transport = roundTrip(func(r *http.Request) *http.Response {
				first = r
				require.EqualValues(t, len(frame), r.ContentLength)
				again, err := r.GetBody()
				require.NoError(t, err)
				all, err := io.ReadAll(again)
				require.NoError(t, err)
				require.Equal(t, frame, all)
				c.traces(httptrace.ContextClientTrace(r.Context()))
				return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader("reply"))}
			})
			reply, err := h.RoundTrip(t.Context(), frame, 100)
			require.NoError(t, err)
			require.Equal(t, "reply", string(reply))
			clear(h.spare.Get(len(frame))[:len(frame)])
			sent := bytes.Clone(frame)
			clear(frame)
			left, err := io.ReadAll(first.Body)
			require.NoError(t, err)
			require.Equal(t, sent, left)
			copy(frame, sent)
		})
	}
}
