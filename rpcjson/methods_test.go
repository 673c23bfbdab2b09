package rpcjson

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
)

func TestDecisions(t *testing.T) {
	wrap := func(err error) error { return &ota.Error{Op: "x", Slot: 1, Off: -1, Err: err} }
	boom := errors.New("flash is gone")
	for _, c := range []struct {
		method, params, op string
		err                error
		want               string
	}{
		{"OTA.Commit", "", "commit", nil, null},
		{"OTA.Commit", "", "commit", wrap(ota.ErrCommitted), `"error":{"code":-1}`},
		{"OTA.Commit", "", "commit", wrap(ota.ErrExpired), fail(-1, "ota: x: slot 1: the commit timeout has expired", "expired")},
		{"OTA.Commit", `{"trial":null}`, "commit", boom, fail(-1, "flash is gone")},
		{"OTA.Commit", `{"trial":"0102030405060708"}`, "commit 0102030405060708", nil, null},
		{"OTA.Commit", `{"trial":"0102030405060708"}`, "commit 0102030405060708", ota.ErrWrongTrial, fail(-1, "the commit names another trial", "wrong-trial")},
		{"OTA.Commit", `{"trial":"01"}`, "", nil, fail(400, `trial: need 16 hexadecimal digits, got \"01\"`)},
		{"OTA.Commit", `{"trial":{}}`, "", nil, fail(400, `trial: need a string, got \"{}\"`)},
		{"OTA.Revert", "", "revert", nil, null},
		{"OTA.Revert", "", "revert", wrap(ota.ErrCommitted), `"error":{"code":-1}`},
		{"OTA.Revert", "", "revert", ota.ErrNoRevert, fail(-1, "there is no slot to revert to")},
		{"OTA.CreateSnapshot", "", "snapshot", nil, `"result":{"slot": 1}`},
		{"OTA.CreateSnapshot", "", "snapshot", wrap(ota.ErrNotCommitted), fail(-1, "Cannot create snapshots in uncommitted state", "not-committed")},
		{"OTA.CreateSnapshot", "", "snapshot", ota.ErrNoBootState, fail(-2, "Failed to get boot state: no boot state is stored yet")},
		{"OTA.CreateSnapshot", "", "snapshot", ota.ErrStateUnknown, fail(-3, "Failed to set boot state: the boot state could not be stored or read back")},
		{"OTA.CreateSnapshot", "", "snapshot", boom, fail(-1, "Failed to create snapshot: flash is gone")},
		{"OTA.CreateSnapshot", `{"set_as_revert":1}`, "", nil, fail(400, `set_as_revert: need true or false, got \"1\"`)},
		{"OTA.GetBootState", "", "bootstate", ota.ErrBadBootState, fail(-1, "Failed to get boot state: the stored boot state is damaged beyond repair")},
		{"OTA.SetBootState", `{"revert_slot":1}`, "setbootstate", nil, null},
		{"OTA.SetBootState", `{"active_slot":7}`, "setbootstate", wrap(ota.ErrUnknownSlot), fail(-3, "ota: x: slot 1: no such slot", "unknown-slot")},
		{"OTA.SetBootState", `{"active_slot":1}`, "setbootstate", ota.ErrNoBootState, fail(-1, "no boot state is stored yet")},
		{"OTA.SetBootState", "", "", nil, fail(-2, "need active_slot, is_committed, revert_slot or commit_timeout")},
		{"OTA.SetBootState", `{"active_slot":"abc","is_committed":false}`, "", nil, fail(400, `active_slot: need an integer, got \"abc\"`)},
		{"OTA.SetBootState", `{"is_committed":"true"}`, "", nil, fail(400, `is_committed: need true or false, got \"true\"`)},
		{"OTA.SetBootState", `{"active_slot":4294967296}`, "", nil, fail(400, `active_slot: need an integer from -2147483648 to 2147483647, got \"4294967296\"`)},
		{"OTA.SetBootState", `{"commit_timeout":-1}`, "", nil, fail(400, `commit_timeout: need an integer from 0 to 2592000, got \"-1\"`)},
		{"RPC.Ping", "", "", nil, `"result":{"channel_info": "here"}`},
		{"RPC.Describe", "", "", nil, fail(400, "name is required")},
		{"RPC.Describe", `{"name":{}}`, "", nil, fail(400, `name: need a string, got \"{}\"`)},
		{"RPC.Describe", `{"name":"x"}`, "", nil, fail(404, "name not found")},
		{"RPC.Describe", `{"name":"ota.write"}`, "", nil, `"result":{"name": "OTA.Write", "args_fmt": "{offset: %ld, data: %V}"}`},
		{"Sys.GetUID", "", "", nil, `"result":{"pid": "p", "app": "demo", "uid": "u"}`},
		{"Sys.Reboot", `{"delay_ms":-1}`, "", nil, fail(400, "invalid delay value")},
		{"Sys.Reboot", `{"delay_ms":600001}`, "", nil, fail(400, "invalid delay value")},
		{"Sys.Reboot", `{"delay_ms":9999999999999}`, "", nil, fail(400, "invalid delay value")},
		{"Sys.Reboot", `{"abort":true}`, "", nil, fail(400, "abort is not supported")},
		{"Sys.Reboot", `{"delay_ms":"soon"}`, "", nil, fail(400, `delay_ms: need an integer, got \"soon\"`)},
	} {
		d := newFake()
		d.errs[c.op] = c.err
		s := newTest(t, d, nil)
		require.Equal(t, c.want, do(t, s, c.method, c.params), "%s %s", c.method, c.params)
		if c.op == "" {
			require.Empty(t, d.log(), "%s %s", c.method, c.params)
		} else {
			require.Equal(t, []string{c.op}, d.log())
		}
		rebooting := c.method == "OTA.Revert" && c.err == nil
		s.mu.Lock()
		require.Equal(t, rebooting, !s.due.IsZero(), "%s %s", c.method, c.params)
		s.mu.Unlock()
	}
}

func TestArgumentsReachDevice(t *testing.T) {
	d := newFake()
	s := newTest(t, d, func(o *Options) { o.CommitTimeout = 7 * time.Second })
	require.Equal(t, null, do(t, s, "OTA.SetBootState", `{active_slot:"1", is_committed:false, revert_slot:-1, commit_timeout:"0x10"}`))
	require.Equal(t, ota.SlotID(1), *d.patch.Active)
	require.False(t, *d.patch.Committed)
	require.Equal(t, ota.NoSlot, *d.patch.Revert)
	require.Equal(t, 16*time.Second, *d.patch.CommitTimeout)
	require.Equal(t, null, do(t, s, "OTA.SetBootState", `{"is_committed":true,"active_slot":null}`))
	require.Equal(t, ota.BootStatePatch{Committed: d.patch.Committed}, d.patch)
	require.True(t, *d.patch.Committed)

	for params, want := range map[string]ota.SnapshotOptions{
		``: {CommitTimeout: 7 * time.Second},
		`{"set_as_revert":true,"commit_timeout":"300"}`: {SetAsRevert: true, CommitTimeout: 300 * time.Second},
		`{"set_as_revert":true,"commit_timeout":-1}`:    {SetAsRevert: true, CommitTimeout: 7 * time.Second},
		`{"set_as_revert":false,"commit_timeout":0}`:    {},
	} {
		do(t, s, "OTA.CreateSnapshot", params)
		require.Equal(t, want, d.snap, params)
	}
}

func TestRevertReboots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		s := newTest(t, d, nil)
		start := time.Now()
		err := s.Serve(context.Background(), testPeer, []byte(`{"id":1,"method":"OTA.Revert"}`), func([]byte) error {
			time.Sleep(2 * time.Second) // a slow line
			return nil
		})
		require.NoError(t, err)
		time.Sleep(time.Second)
		require.Len(t, d.rebootTimes(), 1)
		require.Equal(t, 2300*time.Millisecond, d.rebootTimes()[0].Sub(start), "300 ms after the reply")
	})
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		s := newTest(t, d, nil)
		go func() {
			_ = s.Serve(context.Background(), testPeer, []byte(`{"id":1,"method":"OTA.Revert"}`), func([]byte) error {
				time.Sleep(time.Hour) // a dead line
				return nil
			})
		}()
		time.Sleep(5*time.Second + 1)
		require.Equal(t, 1, d.rebootCount())
		time.Sleep(time.Hour)
		synctest.Wait()
		require.Equal(t, 1, d.rebootCount())
	})
}

func TestSendFails(t *testing.T) {
	s := newTest(t, newFake(), nil)
	boom := errors.New("broken pipe")
	err := s.Serve(context.Background(), testPeer, []byte(`{"id":1,"method":"OTA.Status"}`), func([]byte) error { return boom })
	require.Equal(t, boom, err)
}

func TestStatusAfterRevert(t *testing.T) {
	d := newFake()
	d.state.Last = ota.Result{Outcome: ota.OutcomeReverted, Reason: ota.ReasonTimeout, Message: "no\tnetwork"}
	s := newTest(t, d, nil)
	require.Equal(t, statusText(2, "reverted: commit timeout: no?network", true, 0), do(t, s, "OTA.Status", ""))
	d.busy = "update"
	require.Equal(t, statusText(1, "progress", true, 0), do(t, s, "OTA.Status", ""), "one that the program itself started")
}

// A trial that was called off before it began needs no reboot.
func TestRevertWithoutReboot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		d.calledOff = true
		s := newTest(t, d, nil)
		require.Equal(t, null, do(t, s, "OTA.Revert", ""))
		<-time.After(time.Hour)
		require.Empty(t, d.rebootTimes())
	})
}

func TestHandle(t *testing.T) {
	s := newTest(t, newFake(), nil)
	reply := func(v any, err error) HandlerFunc {
		return func(context.Context, *Request) (any, error) { return v, err }
	}
	require.NoError(t, s.Handle("Pin.Set", "{pin: %d}", Operate, func(_ context.Context, r *Request) (any, error) {
		pin, _ := r.Args.Int("pin", 0, 40)
		return map[string]any{"pin": pin, "by": r.Src, "method": r.Method, "text": "a<b ä"}, r.Args.Err()
	}))
	require.Equal(t, `"result":{"by":"t","method":"Pin.Set","pin":5,"text":"a\u003cb \u00e4"}`, do(t, s, "PIN.set", `{"pin":5}`))
	require.Equal(t, fail(400, `pin: need an integer from 0 to 40, got \"41\"`), do(t, s, "Pin.Set", `{"pin":41}`))
	require.Equal(t, `"result":{"name": "Pin.Set", "args_fmt": "{pin: %d}"}`, do(t, s, "RPC.Describe", `{"name":"Pin.Set"}`))

	require.NoError(t, s.Handle("pin.SET", "", Read, reply(json.RawMessage(`{"a": "ü"}`), nil)))
	require.Equal(t, `"result":{"a": "\u00fc"}`, do(t, s, "Pin.Set", ""), "the newest wins")
	require.Equal(t, `"result":["pin.SET","Sys.GetUID","OTA.SetBootState","OTA.GetBootState","OTA.Status","OTA.End","OTA.Write","OTA.Begin",`+
		`"OTA.CreateSnapshot","OTA.Revert","OTA.Commit","OTA.Update","Sys.GetInfo","Sys.Reboot","RPC.Ping","RPC.Describe","RPC.List"]`, do(t, s, "RPC.List", ""))

	for _, v := range []any{nil, json.RawMessage(nil), json.RawMessage("")} {
		require.NoError(t, s.Handle("E", "", Read, reply(v, nil)))
		require.Equal(t, null, do(t, s, "E", ""))
	}
	require.NoError(t, s.Handle("E", "", Read, reply(nil, fmt.Errorf("wrapped: %w", &Error{Code: -7, Message: "x"}))))
	require.Equal(t, fail(-7, "x"), do(t, s, "E", ""))
	require.NoError(t, s.Handle("E", "", Read, reply(nil, errors.New("plain"))))
	require.Equal(t, fail(500, "plain"), do(t, s, "E", ""))
	require.NoError(t, s.Handle("E", "", Read, reply(make(chan int), nil)))
	require.Equal(t, fail(500, "result: json: unsupported type: chan int"), do(t, s, "E", ""))

	for _, err := range []error{
		s.Handle("", "", Read, reply(nil, nil)),
		s.Handle("a b", "", Read, reply(nil, nil)),
		s.Handle("a/b", "", Read, reply(nil, nil)),
		s.Handle("a", "", 0, reply(nil, nil)),
		s.Handle("a", "", 4, reply(nil, nil)),
		s.Handle("a", "", Read, nil),
	} {
		require.ErrorIs(t, err, ota.ErrInvalid)
	}
}

func TestNewRefuses(t *testing.T) {
	_, err := New(nil, testOptions())
	require.ErrorIs(t, err, ota.ErrInvalid)
	_, err = New(new(ota.Device), Options{ID: "x"})
	require.ErrorContains(t, err, "rpcjson: Authorizer: need one, or NoAuth")
	for want, change := range map[string]func(*Options){
		"ID: need 1":     func(o *Options) { o.ID = "" },
		"NoAuth: contra": func(o *Options) { o.Authorizer = AuthorizerFunc(nil) },
		"need printable": func(o *Options) { o.ID = "1\r\nX-Evil: 1" },
		"MaxFrame":       func(o *Options) { o.MaxFrame = -1 },
		"MaxDepth":       func(o *Options) { o.MaxDepth = 1001 },
		"MaxPending":     func(o *Options) { o.MaxPending = -1 },
		"UpdateTimeout":  func(o *Options) { o.UpdateTimeout = -1 },
		"TotalTimeout":   func(o *Options) { o.TotalTimeout = maxTimeout + 1 },
		"CommitTimeout":  func(o *Options) { o.CommitTimeout = ota.MaxCommitTimeout + 1 },
		"AllowOrigins":   func(o *Options) { o.AllowOrigins = []string{"*"} },
	} {
		o := testOptions()
		change(&o)
		_, err := newServer(newFake(), o)
		require.ErrorIs(t, err, ota.ErrInvalid, want)
		require.ErrorContains(t, err, want)
	}
}

// Every method asks for its right, before it looks at anything else.
func TestRights(t *testing.T) {
	rights := map[string]Right{
		"RPC.List": Read, "RPC.Describe": Read, "RPC.Ping": Read, "Sys.GetInfo": Read, "Sys.GetUID": Read,
		"OTA.Status": Read, "OTA.GetBootState": Read,
		"OTA.Commit": Operate, "OTA.Revert": Operate, "Sys.Reboot": Operate,
		"OTA.Update": Install, "OTA.Begin": Install, "OTA.Write": Install, "OTA.End": Install,
		"OTA.CreateSnapshot": Install, "OTA.SetBootState": Install,
	}
	var answer error
	d := newFake()
	var asked map[string]Right
	var auth string
	s := newTest(t, d, func(o *Options) {
		o.NoAuth = false
		o.Authorizer = AuthorizerFunc(func(_ context.Context, p *Peer, method string, r Right) error {
			asked[method] = r
			auth = string(p.Auth)
			return answer
		})
	})
	for want, err := range map[string]error{
		fail(401, "unauthenticated"):      fmt.Errorf("no token: %w", ErrUnauthenticated),
		fail(403, "unauthorized"):         ErrForbidden,
		fail(500, "authorization failed"): errors.New("secret: disk error"),
		fail(401, `{\"nonce\": 1}`):       &Error{Code: 401, Message: `{"nonce": 1}`},
		fail(403, "no code"):              fmt.Errorf("%w", &Error{Message: "no code"}),
	} {
		answer, asked = err, map[string]Right{}
		for m := range rights {
			require.Equal(t, want, do(t, s, strings.ToLower(m), `{"damaged":`+`1}`))
		}
		require.Equal(t, rights, asked)
	}
	require.Empty(t, d.log())
	require.Len(t, s.methods, len(rights))
	_, err := s.Call(context.Background(), testPeer, []byte(`{"id":1,"method":"OTA.Status","auth":{"realm":"RPC"}}`))
	require.NoError(t, err)
	require.Equal(t, `{"realm":"RPC"}`, auth)
	answer = nil
	require.Contains(t, do(t, s, "OTA.Status", ""), `"state": 0`)
	require.Empty(t, auth)
}

func TestMaxPending(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), func(o *Options) { o.MaxPending = 2 })
		require.NoError(t, s.Handle("Wait", "", Read, func(ctx context.Context, _ *Request) (any, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}))
		ctx, cancel := context.WithCancel(context.Background())
		errs := make(chan error, 2)
		for range 2 {
			go func() {
				_, err := s.Call(ctx, testPeer, []byte(`{"id":1,"method":"Wait"}`))
				errs <- err
			}()
		}
		synctest.Wait()
		require.Equal(t, fail(429, "Request queue overflow"), do(t, s, "OTA.Status", ""))
		cancel()
		require.ErrorIs(t, <-errs, context.Canceled)
		require.ErrorIs(t, <-errs, context.Canceled)
		require.Contains(t, do(t, s, "OTA.Status", ""), `"state": 0`)

		go func() {
			_, err := s.Call(context.Background(), testPeer, []byte(`{"id":1,"method":"Wait"}`))
			errs <- err
		}()
		synctest.Wait()
		require.NoError(t, s.Close())
		require.ErrorIs(t, <-errs, ErrClosed)
	})
}

// Close waits for what is being served, also if it does not heed its context.
func TestCloseWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTest(t, newFake(), nil)
		require.NoError(t, s.Handle("Busy", "", Read, func(context.Context, *Request) (any, error) {
			time.Sleep(time.Minute)
			return "done", nil
		}))
		start := time.Now()
		reply := make(chan string, 1)
		go func() { reply <- do(t, s, "Busy", "") }()
		synctest.Wait()
		require.NoError(t, s.Close())
		require.Equal(t, time.Minute, time.Since(start))
		require.Equal(t, `"result":"done"`, <-reply)
		for _, m := range []string{"Busy", "OTA.Status", "Nope"} {
			_, err := s.Call(context.Background(), testPeer, []byte(`{"id":1,"method":"`+m+`"}`))
			require.ErrorIs(t, err, ErrClosed, m)
			require.Equal(t, 503, try(s, "GET", "/rpc/"+m, "", nil).Code, m)
		}
	})
}

// A call that was let in just before Close does not start anything.
func TestCloseWhileAuthorizing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		s := newTest(t, d, func(o *Options) {
			o.NoAuth = false
			o.Authorizer = AuthorizerFunc(func(context.Context, *Peer, string, Right) error {
				time.Sleep(time.Second)
				return nil
			})
		})
		errs := map[string]chan error{"OTA.Begin": make(chan error, 1), "OTA.Revert": make(chan error, 1), "Sys.Reboot": make(chan error, 1)}
		for m, c := range errs {
			go func() {
				_, err := s.Call(context.Background(), testPeer, []byte(`{"id":1,"method":"`+m+`"}`))
				c <- err
			}()
		}
		synctest.Wait()
		require.NoError(t, s.Close())
		require.ErrorIs(t, <-errs["OTA.Begin"], ErrClosed)
		require.ErrorIs(t, <-errs["OTA.Revert"], ErrClosed)
		require.NoError(t, <-errs["Sys.Reboot"], "it waits for nothing")
		time.Sleep(time.Hour)
		require.Empty(t, d.log())
	})
}

// The version is that of whatever was installed. It must not keep the device from
// being updated again.
func TestUnprintableInfo(t *testing.T) {
	d := newFake()
	var got http.Header
	s := newTest(t, d, func(o *Options) {
		o.Info.Version = "1\r\nX-Evil: 1 \u00fc\xff"
		o.Info.BuildID = strings.Repeat("b", 10000)
		o.Info.App = "a\x00b"
		o.HTTPClient = &http.Client{Transport: roundTrip(func(r *http.Request) *http.Response {
			got = r.Header
			return response(200, "firmware")
		})}
	})
	info := do(t, s, "Sys.GetInfo", "")
	require.Contains(t, info, `"app": "a\u0000b", "fw_version": "1\r\nX-Evil: 1 \u00fc\ufffd", "fw_id": "bbb`)
	require.Equal(t, `"result":true`, do(t, s, "OTA.Update", `{"url":"https://h/"}`))
	require.Equal(t, "a?b/1??X-Evil: 1 ?? (MongooseOS/2.19.1; esp32)", got.Get("User-Agent"))
	require.Equal(t, "esp32 1??X-Evil: 1 ?? "+strings.Repeat("b", 128), got.Get("X-MGOS-FW-Version"))
}

// An operation goes on when its caller leaves.
func TestCallerLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFake()
		s := newTest(t, d, nil)
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_, err := s.Call(ctx, testPeer, []byte(`{"id":1,"method":"OTA.Revert"}`))
		if err != nil {
			require.ErrorIs(t, err, context.Canceled)
		}
		synctest.Wait()
		require.Equal(t, []string{"revert"}, d.log())
		time.Sleep(6 * time.Second)
		require.Equal(t, 1, d.rebootCount(), "also without anybody to reply to")
	})
}
