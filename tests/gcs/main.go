// A Google Cloud Storage server for the tests: fsouza/fake-gcs-server, in memory, with the writes of the XML API.
//
// The tests' client writes by the XML API, of which fake-gcs-server has reading, listing and deleting. The writes are said
// here in the words of the JSON API, so that what decides a put-if-absent is the server's own: the header
// x-goog-if-generation-match becomes ifGenerationMatch. Of a multipart upload the parts wait here until it is completed.
//
// With -look-first a put-if-absent is what a careless server makes of it: a look, and then a write.
package main

import (
	"bytes"
	"crypto/md5"
	"encoding/hex"
	"encoding/xml"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/fsouza/fake-gcs-server/fakestorage"
)

const bucket = "anello"

func main() {
	address := flag.String("address", "127.0.0.1:4443", "where it listens, on loopback")
	lookFirst := flag.Bool("look-first", false, "a put-if-absent that is not atomic")
	flag.Parse()
	storage, err := fakestorage.NewServerWithOptions(fakestorage.Options{NoListener: true, PublicHost: *address})
	if err != nil {
		log.Fatal(err)
	}
	storage.CreateBucketWithOpts(fakestorage.CreateBucketOpts{Name: bucket})
	listener, err := net.Listen("tcp", *address)
	if err != nil {
		log.Fatal(err)
	}
	served := &server{
		storage: storage.HTTPHandler(), host: *address, lookFirst: *lookFirst, uploads: map[string]map[string][]byte{},
	}
	log.Fatal(http.Serve(listener, served))
}

type server struct {
	storage   http.Handler
	host      string
	lookFirst bool

	lock    sync.Mutex
	begun   int
	uploads map[string]map[string][]byte // parts by upload and number
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	object, isObject := strings.CutPrefix(r.URL.Path, "/"+bucket+"/")
	if !isObject || object == "" || (r.Method == http.MethodGet || r.Method == http.MethodHead) {
		s.storage.ServeHTTP(w, r)
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	query := r.URL.Query()
	upload := query.Get("uploadId")
	switch {
	case r.Method == http.MethodPost && query.Has("uploads"):
		s.begin(w)
	case r.Method == http.MethodPut && upload != "":
		s.part(w, upload, query.Get("partNumber"), body)
	case r.Method == http.MethodPost && upload != "":
		s.complete(w, object, upload, body)
	case r.Method == http.MethodDelete && upload != "":
		s.take(upload)
		w.WriteHeader(http.StatusNoContent)
	case r.Method == http.MethodPut:
		s.put(w, object, r.Header.Get("x-goog-if-generation-match"), body)
	default:
		s.storage.ServeHTTP(w, r)
	}
}

// put writes an object; generation is that of the one which must be there, "0" of none, "" whatever is there.
func (s *server) put(w http.ResponseWriter, object, generation string, body []byte) {
	query := url.Values{"uploadType": {"media"}, "name": {object}}
	switch {
	case generation != "" && s.lookFirst:
		look := s.ask(http.MethodGet, "/"+bucket+"/"+object, nil)
		time.Sleep(2 * time.Millisecond)
		if (look.Code == http.StatusNotFound) != (generation == "0") {
			w.WriteHeader(http.StatusPreconditionFailed)
			return
		}
	case generation != "":
		query.Set("ifGenerationMatch", generation)
	}
	answer := s.ask(http.MethodPost, "/upload/storage/v1/b/"+bucket+"/o?"+query.Encode(), body)
	if answer.Code == http.StatusOK {
		w.Header().Set("ETag", etag(body))
		w.Header().Set("x-goog-generation", "1")
	}
	w.WriteHeader(answer.Code)
	if answer.Code != http.StatusOK {
		_, _ = w.Write(answer.Body.Bytes())
	}
}

func (s *server) begin(w http.ResponseWriter) {
	s.lock.Lock()
	s.begun++
	upload := fmt.Sprintf("upload-%d", s.begun)
	s.uploads[upload] = map[string][]byte{}
	s.lock.Unlock()
	answer(w, struct {
		XMLName  xml.Name `xml:"InitiateMultipartUploadResult"`
		UploadId string
	}{UploadId: upload})
}

func (s *server) part(w http.ResponseWriter, upload, number string, body []byte) {
	s.lock.Lock()
	parts, there := s.uploads[upload]
	if there {
		parts[number] = body
	}
	s.lock.Unlock()
	if !there {
		http.Error(w, "NoSuchUpload", http.StatusNotFound)
		return
	}
	w.Header().Set("ETag", etag(body))
	w.Header().Set("x-goog-generation", "1")
}

// complete makes the object of the parts that the request names, when they are those that were sent.
func (s *server) complete(w http.ResponseWriter, object, upload string, body []byte) {
	var named struct {
		Part []struct {
			PartNumber string
			ETag       string
		}
	}
	parts := s.take(upload)
	if err := xml.Unmarshal(body, &named); err != nil || parts == nil || len(named.Part) != len(parts) {
		http.Error(w, "InvalidPart", http.StatusBadRequest)
		return
	}
	var whole bytes.Buffer
	for _, part := range named.Part {
		sent, there := parts[part.PartNumber]
		if !there || strings.Trim(part.ETag, `"`) != strings.Trim(etag(sent), `"`) {
			http.Error(w, "InvalidPart", http.StatusBadRequest)
			return
		}
		whole.Write(sent)
	}
	written := httptest.NewRecorder()
	s.put(written, object, "", whole.Bytes())
	if written.Code != http.StatusOK {
		w.WriteHeader(written.Code)
		return
	}
	w.Header().Set("x-goog-generation", "1")
	answer(w, struct {
		XMLName xml.Name `xml:"CompleteMultipartUploadResult"`
		ETag    string
	}{ETag: etag(whole.Bytes())})
}

func (s *server) take(upload string) map[string][]byte {
	s.lock.Lock()
	defer s.lock.Unlock()
	parts := s.uploads[upload]
	delete(s.uploads, upload)
	return parts
}

func (s *server) ask(method, path string, body []byte) *httptest.ResponseRecorder {
	recorder := httptest.NewRecorder()
	request := httptest.NewRequest(method, path, bytes.NewReader(body))
	request.Host = s.host
	s.storage.ServeHTTP(recorder, request)
	return recorder
}

func answer(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/xml")
	_ = xml.NewEncoder(w).Encode(value)
}

func etag(body []byte) string {
	sum := md5.Sum(body)
	return `"` + hex.EncodeToString(sum[:]) + `"`
}
