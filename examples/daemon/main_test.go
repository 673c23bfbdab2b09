package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/flash/fileflash"
	"github.com/stretchr/testify/require"
)

const secret = "0123456789abcdef"

// newConfig returns the configuration of a daemon on a device that runs slot 0,
// and the key that its firmware is signed with.
func newConfig(t *testing.T) (config, *ecdsa.PrivateKey) {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, content, 0o600))
		return path
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	require.NoError(t, err)
	return config{
		slots: [2]string{
			write("a.img", bytes.Repeat([]byte("factory!"), 32<<10)),
			write("b.img", make([]byte, 256<<10)),
		},
		state:    dir,
		platform: "board",
		key:      write("key.pem", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})),
		token:    write("token", []byte(secret+"\n")),
		log:      slog.New(slog.DiscardHandler),
		reboot:   func(context.Context) error { return nil },
	}, key
}

// firmware returns a signed bundle.
func firmware(t *testing.T, key *ecdsa.PrivateKey, rootfs []byte) []byte {
	t.Helper()
	var zip bytes.Buffer
	m := &bundle.Manifest{Platform: "board", Version: "2.0", Parts: []bundle.Part{{Name: "rootfs", Src: "rootfs.img"}}}
	files := map[string]bundle.File{"rootfs.img": bytes.NewReader(rootfs)}
	require.NoError(t, bundle.Write(t.Context(), &zip, m, files, &bundle.WriteOptions{Keys: []crypto.Signer{key}}))
	return zip.Bytes()
}

// start runs the daemon and returns its address and what ends it.
func start(t *testing.T, c config) (url string, stop func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, c, l) }()
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			cancel()
			require.NoError(t, <-ended)
		}
	}
	t.Cleanup(stop)
	return "http://" + l.Addr().String(), stop
}

// call posts params to the path of a method.
func call(t *testing.T, url, token, method string, params any) (*http.Response, string) {
	t.Helper()
	b, err := json.Marshal(params)
	require.NoError(t, err)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url+"/rpc/"+method, bytes.NewReader(b))
	require.NoError(t, err)
	req.Header.Set("Content-Type", "application/json")
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	res, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return res, strings.TrimSpace(string(body))
}

func must(t *testing.T, url, method string, params any) string {
	t.Helper()
	res, body := call(t, url, secret, method, params)
	require.Equal(t, http.StatusOK, res.StatusCode, "%s: %s", method, body)
	return body
}

// push sends a firmware file to the device.
func push(t *testing.T, url string, zip []byte) {
	t.Helper()
	type object map[string]any
	must(t, url, "OTA.Begin", object{"size": len(zip), "commit_timeout": 0})
	for off := 0; off < len(zip); off += 64 << 10 {
		must(t, url, "OTA.Write", object{"offset": off, "data": zip[off:min(len(zip), off+64<<10)]}) // in base64
	}
	must(t, url, "OTA.End", object{})
}

// boot is the boot stage, as in examples/bootstage.
func boot(t *testing.T, c config) ota.Handover {
	t.Helper()
	var slots []ota.Slot
	var copies []string
	for _, path := range c.slots {
		f, err := fileflash.Open(path, &fileflash.Options{ReadOnly: true})
		require.NoError(t, err)
		defer f.Close()
		slots = append(slots, ota.Slot{Parts: []ota.Part{{Name: "rootfs", Flash: f}}})
	}
	for i := range 3 {
		copies = append(copies, filepath.Join(c.state, fmt.Sprint("boot.", i)))
	}
	record, err := bootrecord.Files(copies, nil)
	require.NoError(t, err)
	h, err := ota.Boot(t.Context(), record, slots, nil)
	require.NoError(t, err)
	return h
}

func TestUpdate(t *testing.T) {
	c, key := newConfig(t)
	rebooted := make(chan struct{}, 1)
	c.reboot = func(context.Context) error { rebooted <- struct{}{}; return nil }
	url, stop := start(t, c)

	for _, token := range []string{"", "0123456789abcdeF", secret + "0"} {
		for _, method := range []string{"OTA.GetBootState", "OTA.Begin", "OTA.Update", "OTA.Commit"} {
			res, body := call(t, url, token, method, nil)
			require.Equal(t, http.StatusUnauthorized, res.StatusCode, "%s with %q: %s", method, token, body)
			require.Equal(t, `Bearer realm="RPC"`, res.Header.Get("WWW-Authenticate"))
		}
	}
	require.JSONEq(t, `{"active_slot": 0, "is_committed": true, "revert_slot": -1, "commit_timeout": 0}`, must(t, url, "OTA.GetBootState", nil))

	rootfs := bytes.Repeat([]byte("version 2.0\n"), 15000)
	push(t, url, firmware(t, key, rootfs))
	require.JSONEq(t, `{"active_slot": 1, "is_committed": false, "revert_slot": 0, "commit_timeout": 0}`, must(t, url, "OTA.GetBootState", nil))
	select {
	case <-rebooted:
	case <-time.After(10 * time.Second):
		require.Fail(t, "no reboot")
	}
	stop()
	written, err := os.ReadFile(c.slots[1])
	require.NoError(t, err)
	require.Equal(t, rootfs, written[:len(rootfs)])

	// The new firmware boots, finds itself healthy, and commits itself.
	h := boot(t, c)
	require.Equal(t, ota.SlotID(1), h.Slot)
	asked := make(chan struct{}, 100)
	app := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked <- struct{}{} }))
	defer app.Close()
	c.running, c.health = 1, app.URL
	url, stop = start(t, c)
	require.Eventually(t, func() bool {
		return must(t, url, "OTA.GetBootState", nil) == `{"active_slot": 1, "is_committed": true, "revert_slot": -1, "commit_timeout": 0}`
	}, 10*time.Second, 10*time.Millisecond)
	require.NotEmpty(t, asked)
	stop()
	require.Equal(t, ota.SlotID(1), boot(t, c).Slot)
}

func TestForeignFirmwareIsRefused(t *testing.T) {
	c, _ := newConfig(t)
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	url, _ := start(t, c)
	must(t, url, "OTA.Begin", nil)
	res, body := call(t, url, secret, "OTA.Write", map[string]any{"offset": 0, "data": firmware(t, other, make([]byte, 4096))})
	require.Equal(t, http.StatusInternalServerError, res.StatusCode)
	require.Contains(t, strings.ToLower(body), "signature")
	require.JSONEq(t, `{"active_slot": 0, "is_committed": true, "revert_slot": -1, "commit_timeout": 0}`, must(t, url, "OTA.GetBootState", nil))
}

func TestTLS(t *testing.T) {
	c, key := newConfig(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		NotAfter:     time.Now().Add(time.Hour),
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	require.NoError(t, err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	c.tlsCert, c.tlsKey = filepath.Join(c.state, "tls.crt"), filepath.Join(c.state, "tls.key")
	require.NoError(t, os.WriteFile(c.tlsCert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o600))
	require.NoError(t, os.WriteFile(c.tlsKey, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600))

	url, _ := start(t, c)
	own, err := x509.ParseCertificate(cert)
	require.NoError(t, err)
	roots := x509.NewCertPool()
	roots.AddCert(own)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, strings.Replace(url, "http:", "https:", 1)+"/rpc/OTA.Status", nil)
	require.NoError(t, err)
	req.Header.Set("Authorization", "Bearer "+secret)
	res, err := client.Do(req)
	require.NoError(t, err)
	defer res.Body.Close()
	require.Equal(t, http.StatusOK, res.StatusCode)
	require.NotNil(t, res.TLS)
}

func TestHealthy(t *testing.T) {
	status := http.StatusOK
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }))
	defer app.Close()
	require.NoError(t, healthy(t.Context(), app.URL))
	status = http.StatusServiceUnavailable
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	require.EqualError(t, healthy(ctx, app.URL), "503 Service Unavailable")
}

func TestRunningSlot(t *testing.T) {
	for _, c := range []struct {
		cmdline string
		want    ota.SlotID
	}{
		{"root=/dev/x ota.slot=1 quiet\n", 1},
		{"ota.slot=0", 0},
	} {
		got, err := runningSlot(c.cmdline)
		require.NoError(t, err, c.cmdline)
		require.Equal(t, c.want, got, c.cmdline)
	}
	for _, cmdline := range []string{"", "root=/dev/x", "xota.slot=1", "ota.slot=", "ota.slot=-1", "ota.slot=999"} {
		_, err := runningSlot(cmdline)
		require.Error(t, err, cmdline)
	}
}

// open is a listener that says it is not on loopback.
type open struct{ net.Listener }

func (open) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 8910} }

func TestRefusesToStart(t *testing.T) {
	c, _ := newConfig(t)
	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		return l
	}
	require.ErrorContains(t, run(t.Context(), c, open{listen()}), "without TLS")
	for name, spoil := range map[string]func(*config){
		"no slot":        func(c *config) { c.slots[1] += "x" },
		"no such slot":   func(c *config) { c.running = 2 },
		"no state":       func(c *config) { c.state += "x" },
		"no key":         func(c *config) { c.key += "x" },
		"no public key":  func(c *config) { c.key = c.token },
		"no token":       func(c *config) { c.token += "x" },
		"empty token":    func(c *config) { c.token = os.DevNull },
		"no certificate": func(c *config) { c.tlsCert = c.token },
	} {
		bad := c
		spoil(&bad)
		require.Error(t, run(t.Context(), bad, listen()), name)
	}
}
